"""What a served team has done, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from satune.serve.served import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds of the histogram's buckets."""


@dataclass(slots=True)
class Metrics:
    """Counts since the start. ``requests`` are chat requests by the status they ended with, "gone"
    where the client left first; ``within`` counts those that were answered by bucket."""

    requests: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def answered(self, answers: Sequence[Answer], seconds: float) -> None:
        """A request was answered after so long."""
        self.seconds += seconds
        self.within[bisect_left(BOUNDS, seconds)] += 1
        for answer in answers:
            self.answers[answer.finish_reason] += 1
            self.turns += len(answer.turns)
            self.prompt_tokens += sum(turn.prompt_tokens for turn in answer.turns)
            self.completion_tokens += sum(turn.completion_tokens for turn in answer.turns)

    def text(self, asked: int) -> str:
        """All of it; ``asked`` answers are waited for now."""
        lines = [
            *_family("requests", "counter", "Chat requests by the status they ended with.",
                     _labelled("requests_total", "status", self.requests)),
            *_family("answers", "counter", "Answers by how they ended.",
                     _labelled("answers_total", "finish_reason", self.answers)),
            *_family("turns", "counter", "Messages of seats.", {"turns_total": self.turns}),
            *_family("prompt_tokens", "counter", "Tokens that seats have read.",
                     {"prompt_tokens_total": self.prompt_tokens}),
            *_family("completion_tokens", "counter", "Tokens that seats have written.",
                     {"completion_tokens_total": self.completion_tokens}),
            *_family("asked", "gauge", "Answers that are waited for.", {"asked": asked}),
            *_family("request_seconds", "histogram", "From a request to the end of its answers.",
                     self._histogram()),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _histogram(self) -> dict[str, float]:
        found: dict[str, float] = {}
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.within, strict=True):
            total += count
            found[f'request_seconds_bucket{{le="{bound}"}}'] = total
        return {**found, "request_seconds_sum": self.seconds, "request_seconds_count": total}


def _labelled(name: str, label: str, counts: Mapping[str, int]) -> dict[str, float]:
    return {f'{name}{{{label}="{value}"}}': count for value, count in sorted(counts.items())}


def _family(name: str, kind: str, help: str, samples: Mapping[str, float]) -> Iterator[str]:
    full = f"satune_{name}{'_total' if kind == 'counter' else ''}"
    yield f"# HELP {full} {help}"
    yield f"# TYPE {full} {kind}"
    for sample, value in samples.items():
        yield f"satune_{sample} {value}"
