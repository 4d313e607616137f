"""Conversations that a task's noisy expert plays through the recipe's own protocol: what the base
models of tiny agents are taught from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from satune.play.match import Match
from satune.play.rollout import rollout_sync
from satune.task_parts import HasExpert
from satune.types import (
    Completion,
    Entry,
    Key,
    Problem,
    Prompt,
    Sampling,
    Seat,
    Task,
    TeamProtocol,
    UserError,
)


class _RecordingView:
    """Keeps what a seat saw and wrote, instead of rendering it."""

    def __init__(self, seat: str) -> None:
        self.seat = seat
        self.entries: list[Entry] = []
        self._seen = 0

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        new = list(entries[self._seen :])
        if self._seen:
            # The own message stands in ``new`` as well. Of one moment it comes first, as renderers
            # have it: the others' messages were not there yet when it was written.
            self.entries.pop()
            new.sort(key=lambda entry: entry.kind != "own")
        self._seen = len(entries)
        self.entries += new
        return Prompt(({"entries": list(self.entries)},))

    def wrote(self, completion: Completion) -> None:
        self.entries.append(Entry("own", completion.text, self.seat))


class _RecordingRenderer:
    def __init__(self) -> None:
        self.views: list[_RecordingView] = []

    def view(self, seat: str) -> _RecordingView:
        self.views.append(_RecordingView(seat))
        return self.views[-1]


class _ExpertEngine:
    """Answers with the task's expert in place of a model."""

    def __init__(self, expert: Callable[..., str], error: float) -> None:
        self.expert = expert
        self.error = error

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        text = self.expert(prompt.messages[0]["entries"], key.rng("expert"), self.error)
        return Completion(text, "stop", 0)

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        raise AssertionError("an expert has no weights")

    def begin(self, key: Key) -> None: ...

    def end(self, key: Key) -> None: ...

    async def close(self) -> None: ...


def demonstrate(
    task: Task,
    protocol: TeamProtocol,
    seats: Sequence[str],
    problems: Callable[[int], Sequence[Problem]],
    count: int,
    error: float,
    seed: int,
) -> list[list[Entry]]:
    """``count`` conversations of one seat each, in the order the seat saw and wrote them.

    ``problems(n)`` gives n training problems; ``error`` is the share of messages that are wrong on
    purpose. Raises UserError for a task without an expert.
    """
    if not isinstance(task, HasExpert):
        raise UserError(
            f"task {task.name}: has no expert(entries, rng, error) to teach a tiny agent; "
            "name a model directory or a hub id instead"
        )
    renderer = _RecordingRenderer()
    match = Match(
        [Seat(name, name, renderer, Sampling(1)) for name in seats],
        protocol,
        _ExpertEngine(task.expert, error),
        task,
    )
    rollout_sync(match, problems(math.ceil(count / len(seats))), 1, Key(seed, "demonstrate"))
    seen = [view.entries for view in renderer.views if any(e.kind == "own" for e in view.entries)]
    return seen[:count]
