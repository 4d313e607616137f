"""A scripted engine and a trivial renderer: conversations without any model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from satune.types import (
    Completion,
    Entry,
    Grade,
    Key,
    Problem,
    Prompt,
    Sampling,
    Seat,
    ids_of,
    logprobs_of,
)

Writer = Callable[[str, Sequence[Entry], Key], str]


class EntriesView:
    """Hands the entries through as messages, so that the engine (and a test) can read them."""

    def __init__(self) -> None:
        self.written: list[Completion] = []

    def prompt(self, entries: Sequence[Entry], max_new_tokens: int) -> Prompt:
        return Prompt(
            tuple({"entry": entry} for entry in entries), ids=ids_of([len(entries)]), dropped=0
        )

    def wrote(self, completion: Completion) -> None:
        self.written.append(completion)


class EntriesRenderer:
    def __init__(self) -> None:
        self.views: list[tuple[str, EntriesView]] = []

    def view(self, seat: str) -> EntriesView:
        self.views.append((seat, EntriesView()))
        return self.views[-1][1]


class ScriptedEngine:
    """``write(seat, entries, key)`` gives each message. Calls and brackets are recorded.

    ``delays`` maps a seat to how many loop iterations its message takes.
    """

    def __init__(self, write: Writer, delays: Mapping[str, int] | None = None) -> None:
        self.write = write
        self.delays = dict(delays or {})
        self.calls: list[tuple[str, list[Entry], Key]] = []
        self.begun: list[Key] = []
        self.ended: list[Key] = []
        self.events: list[tuple[str, Key]] = []
        self.closed = 0

    async def generate(self, seat: str, prompt: Prompt, sampling: Sampling, key: Key) -> Completion:
        self.events.append(("generate", key))
        entries = [message.get("entry") for message in prompt.messages]
        self.calls.append((seat, entries, key))
        for _ in range(self.delays.get(seat, 0)):
            await asyncio.sleep(0)
        text = self.write(seat, entries, key)
        ids = ids_of(text.encode())
        return Completion(
            text, "stop", 0, ids, logprobs_of(-0.1 * (i + 1) for i in ids), len(entries), len(ids)
        )

    def publish(self, agent: str, version: int, weights: Mapping[str, Any]) -> None:
        raise AssertionError("a scripted engine takes no weights")

    def begin(self, key: Key) -> None:
        self.begun.append(key)
        self.events.append(("begin", key))

    def end(self, key: Key) -> None:
        self.ended.append(key)
        self.events.append(("end", key))

    async def close(self) -> None:
        self.closed += 1


class Letters:
    """A task whose answer is the last letter of a message in a..z; upper case is no answer."""

    name = "letters"

    def problems(self, split: str) -> list[Problem]:
        return [Problem.of("p0", "which letter?", "a")]

    def extract(self, text: str) -> str | None:
        found = [c for c in text if "a" <= c <= "z"]
        return found[-1] if found else None

    def equal(self, a: str, b: str) -> bool:
        return a == b

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        return Grade(float(answer is not None and self.extract(answer) == problem.answer))


def team(*names: str, renderer: EntriesRenderer | None = None) -> list[Seat]:
    """Seats of these names, each filled by an agent "agent-<name>"."""
    sampling = Sampling(16, temperature=0.8)
    return [Seat(n, f"agent-{n}", renderer or EntriesRenderer(), sampling) for n in names]


def by_seat(**scripts: Sequence[str]) -> Writer:
    """A writer that gives each seat its messages in order."""
    return lambda seat, entries, key: scripts[seat][key.own_index]


def expert_writer(task: Any, error: float) -> Writer:
    """A writer that plays the task's expert, each message drawn from its own key."""
    return lambda seat, entries, key: task.expert(entries, key.rng("expert"), error)
