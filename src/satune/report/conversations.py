"""Conversations as a page holds them: an index of all, by columns, and their texts in chunks.

A chunk is the JSON of {"problems": {id: {text, answer}}, "episodes": [...]}; a report of many
conversations leaves the chunks in files beside it, which are read when one of them is opened.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from satune.files.writing import strict_json
from satune.report.charts import number
from satune.report.source import EpisodeRow, TurnRow
from satune.report.tokens import Pieces

INLINE = 4_000_000
"""So many characters of chunks stay in the page; beyond that they go into files of their own."""
CHUNK = 1_000_000
STATUSES = ("finished", "truncated", "failed")
FLAGS = {
    "no answer": "the team gave no answer",
    "dropped": "messages were left out because the context was full",
    "unlikely": "holds a token that had less than 1 chance in 20,000",
    "odd text": "holds control characters, or characters that turn the direction of writing",
    "masked": "the world ended it: no update learnt from it",
}
_UNLIKELY = -9.9
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_COLUMNS = (
    "run", "part", "stage", "step", "problem", "sample", "reward", "status", "flags", "speakers",
    "tokens", "chunk", "place",
)  # fmt: skip

KeepChunk = Callable[[int, str], None]
"""(number of the chunk from 0, its JSON)."""


@dataclass(slots=True)
class Conversations:
    """Takes in episodes one by one. ``keep`` is given each chunk that does not stay in the page;
    ``inline`` holds those that do."""

    keep: KeepChunk
    inline_limit: int = INLINE
    chunk_size: int = CHUNK
    inline: dict[int, str] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    problems: dict[str, int] = field(default_factory=dict)
    previews: list[str] = field(default_factory=list)
    seats: dict[str, int] = field(default_factory=dict)
    chunks: int = 0
    _problems: dict[str, Any] = field(default_factory=dict)
    _episodes: list[str] = field(default_factory=list)
    _held: int = 0
    _inlined: int = 0

    def add(self, run: int, row: EpisodeRow, pieces: Pieces) -> None:
        """Take in one conversation of the run of that number."""
        problem = row["problem"]
        text = _problem_text(problem["prompt"])
        if problem["id"] not in self.problems:
            self.problems[problem["id"]] = len(self.problems)
            self.previews.append(" ".join(text[:200].split())[:100])
        turns = [_turn(turn, pieces) for turn in row["turns"]]
        flags = _flags(row, turns)
        body = {
            "answer": row["answer"],
            "detail": row["grade"]["detail"],
            "components": row["grade"]["components"],
            "seats": row["grade"]["seats"],
            "failure": row["failure"],
            "turns": turns,
            "observations": row["observations"],
        }
        speakers = 0
        for turn in turns:
            speakers |= 1 << self.seats.setdefault(turn["seat"], len(self.seats))
        values = (
            run,
            _part(row),
            row.get("stage", -1),
            row.get("step", 0),
            self.problems[problem["id"]],
            row["sample"],
            number(row["grade"]["score"]),
            _status(row),
            sum(1 << at for at, flag in enumerate(FLAGS) if flag in flags),
            speakers,
            sum(turn["completion_tokens"] for turn in row["turns"]),
            self.chunks,
            len(self._episodes),
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            self.columns[name].append(value)
        if problem["id"] not in self._problems:
            self._problems[problem["id"]] = {"text": text, "answer": _as_text(problem["answer"])}
            self._held += len(text)
        self._episodes.append(as_json(body))
        self._held += len(self._episodes[-1])
        if self._held > self.chunk_size:
            self._close_chunk()

    def finish(self) -> dict[str, Any]:
        """The index: what a page needs to list, filter and find every conversation."""
        if self._episodes:
            self._close_chunk()
        parts = list(dict.fromkeys(self.columns["part"]))
        return {
            "columns": {
                **self.columns,
                "part": [parts.index(part) for part in self.columns["part"]],
            },
            "parts": parts,
            "problems": list(self.problems),
            "previews": self.previews,
            "seats": list(self.seats),
            "statuses": STATUSES,
            "flags": list(FLAGS.items()),
            "chunks": self.chunks,
        }

    def _close_chunk(self) -> None:
        episodes = ",".join(self._episodes)
        chunk = f'{{"problems":{as_json(self._problems)},"episodes":[{episodes}]}}'
        self._inlined += len(chunk)
        if self._inlined <= self.inline_limit:
            self.inline[self.chunks] = chunk
        else:
            for at, earlier in self.inline.items():
                self.keep(at, earlier)
            self.inline.clear()
            self.keep(self.chunks, chunk)
        self.chunks += 1
        self._problems, self._episodes, self._held = {}, [], 0


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element of a page: pure ASCII, without "<"."""
    try:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a number that JSON lacks, as the text that stands for it in files
        text = strict_json(value)
    return text.replace("<", "\\u003c")


def _part(row: EpisodeRow) -> str:
    if "step" in row:
        return "training"
    return "evaluation, greedy" if row.get("greedy") else "evaluation"


def _turn(turn: TurnRow, pieces: Pieces) -> dict[str, Any]:
    ids, logprobs = turn["completion_ids"], turn["sampled_logprobs"]
    made: dict[str, Any] = {
        "seat": turn["seat"],
        "agent": turn["agent"],
        "moment": turn["moment"],
        "text": turn["text"],
        "cut": turn["finish_reason"] == "length",
        "version": turn["version"],
        "dropped": turn["dropped"],
        "tokens": turn["completion_tokens"],
    }
    if logprobs is not None and len(logprobs):
        # Hundredths of a nat below 0: what the eye can tell, in a third of the characters.
        made["surprise"] = [_surprise(value) for value in logprobs]
        lengths = None if ids is None else pieces.lengths(turn["agent"], ids, turn["text"])
        if lengths is not None and len(lengths) == len(logprobs) + 1:
            made["lengths"] = lengths
    return made


def _surprise(logprob: float) -> int:
    return round(-100 * max(logprob, -99.0)) if logprob < 0 else 0


def _status(row: EpisodeRow) -> int:
    if row["failure"] is not None:
        return 2
    return int(any(turn["finish_reason"] == "length" for turn in row["turns"]))


def _flags(row: EpisodeRow, turns: Iterable[Mapping[str, Any]]) -> set[str]:
    found = set()
    if row["answer"] is None:
        found.add("no answer")
    if row["failure"] is not None and not row["failure"]["policy"]:
        found.add("masked")
    for turn in turns:
        if turn["dropped"]:
            found.add("dropped")
        if max(turn.get("surprise", ()), default=0) > -100 * _UNLIKELY:
            found.add("unlikely")
        if any(_is_odd(c) for c in turn["text"] if not c.isprintable()):
            found.add("odd text")
    return found


def _is_odd(character: str) -> bool:
    """Controls but line ends and tabs, and what changes the direction of writing."""
    kind = unicodedata.category(character)
    return (kind == "Cc" and character not in "\n\r\t") or character in _TURNING


def _problem_text(prompt: Iterable[Mapping[str, Any]]) -> str:
    parts = (
        str(part.get("text", "")) if part.get("type") == "text" else f"[{part.get('type', '?')}]"
        for part in prompt
    )
    return "".join(parts)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
