"""A team that is asked by many at once: its conversations share the engine's batches.

They are played in a thread of their own, so that no forward holds up a connection, and a client
that goes away is heeded before the next token.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from satune.play.conversation import together
from satune.play.episode import CUT_THOUGHT, Played, converse
from satune.play.keys import text_key
from satune.play.match import Match
from satune.protocols.independent import solo
from satune.serve.refusal import Refusal
from satune.serve.requests import Ask
from satune.serve.settings import MODEL, ServeSettings
from satune.thoughts import answer_part, without_thoughts
from satune.types import Failure, Grade, Problem, Task, Turn

Tell = Callable[[int, Turn], None]
"""Is given (sample, turn) as the conversation goes on."""


class Reading:
    """A task as a served team needs it: how answers are read and compared. Its problems are the
    clients', and of an environment no action is carried out. None: answers are whole texts."""

    def __init__(self, task: Task | None) -> None:
        self.name = "chat" if task is None else task.name
        self._task = task

    def problems(self, split: str) -> Sequence[Problem]:
        return ()

    def extract(self, text: str) -> str | None:
        if self._task is not None:
            return self._task.extract(text)
        return without_thoughts(text).strip() or None

    def equal(self, a: str, b: str) -> bool:
        return a == b if self._task is None else self._task.equal(a, b)

    def grade(self, problem: Problem, answer: str | None) -> Grade:
        raise AssertionError("what a client asks has no reference to grade by")


@dataclass(frozen=True, slots=True)
class Answer:
    """The team's answer to one sample: its text outside thoughts, and the conversation it came of.

    ``written`` is the turn whose message it is, None where the protocol made it of several or there
    is none.
    """

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    turns: tuple[Turn, ...]
    written: Turn | None


class ServedTeam:
    """``match`` under the name of the team, and each seat alone under its own, to whoever asks.

    ``running`` is the thread that conversations are played in; ``ask`` may be called meanwhile, in
    one event loop. ``fingerprint`` names the team and how it plays: while it is the same, equal
    seeds are answered alike.
    """

    def __init__(self, match: Match, settings: ServeSettings, fingerprint: str = "") -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        self.asked = 0
        """Answers that somebody waits for, played or not."""
        self._matches = {MODEL: replace(match, keep_ids=False)}
        for seat in match.seats:
            alone = replace(match, seats=[seat], protocol=solo, keep_ids=False)
            self._matches[f"{MODEL}/{seat.name}"] = alone
        self._engine = match.engine
        self._copies = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._gate = asyncio.Semaphore(settings.concurrency)

    @property
    def models(self) -> list[str]:
        """What may be asked, the whole team first."""
        return list(self._matches)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Conversations may be played inside the block; at its end those under way are ended."""
        thread = threading.Thread(target=self._loop.run_forever, name="satune-play", daemon=True)
        thread.start()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()

    def ask(self, ask: Ask, tell: Tell = lambda sample, turn: None) -> asyncio.Future[list[Answer]]:
        """The answers to come, one a sample, told of turn by turn. Cancelling frees what the engine
        holds for them.

        Raises Refusal where too many wait already; the future has it where the problem does not fit
        a seat's context, and where the conversation failed, and else whatever a protocol raised.
        """
        room = self.settings.concurrency + self.settings.waiting
        if self.asked + ask.samples > room:
            said = f"{self.asked} answers are waited for, of at most {room}; come again"
            if ask.samples > room:
                raise Refusal(400, f"n: give at most {room}", param="n", code="too_many")
            raise Refusal(429, said, code="overloaded", headers={"Retry-After": "1"})
        loop = asyncio.get_running_loop()

        def told(sample: int, turn: Turn) -> None:
            loop.call_soon_threadsafe(tell, sample, turn)

        def over(_: object) -> None:
            self.asked -= ask.samples

        self.asked += ask.samples
        playing = asyncio.run_coroutine_threadsafe(self._play(ask, told), self._loop)
        answers = asyncio.wrap_future(playing)
        answers.add_done_callback(over)
        return answers

    async def _play(self, ask: Ask, told: Tell) -> list[Answer]:
        match = self._matches[ask.model]
        seats = [replace(seat, sampling=ask.sampling(seat.sampling)) for seat in match.seats]
        matches = [
            replace(match, seats=seats, on_turn=partial(told, sample))
            for sample in range(ask.samples)
        ]
        jobs = [self._one(each, ask, sample) for sample, each in enumerate(matches)]
        return await together(jobs)

    async def _one(self, match: Match, ask: Ask, sample: int) -> Answer:
        # Two clients may ask the same at one time: each has rows of its own.
        key = text_key(ask.seed, ask.problem, sample).at(copy=next(self._copies))
        async with self._gate:
            match.engine.begin(key)
            try:
                played = await converse(match, ask.problem, key)
            finally:
                match.engine.end(key)
        return answer_of(played)

    async def _end(self) -> None:
        others: list[asyncio.Task[Any]] = [
            task for task in asyncio.all_tasks() if task is not asyncio.current_task()
        ]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._engine.close()


def answer_of(played: Played) -> Answer:
    """What a conversation came to. Raises Refusal where it failed."""
    turns = tuple(played.conversation.turns)
    if played.failure is not None:
        return Answer("", _cause(played.failure), turns, None)
    written = next((turn for turn in reversed(turns) if turn.text == played.answer), None)
    cut = any(turn.finish_reason == "length" for turn in ([written] if written else turns))
    text = "" if played.answer is None else answer_part(played.answer) or ""
    return Answer(text, "length" if cut else "stop", turns, written)


def _cause(failure: Failure) -> Literal["length", "content_filter"]:
    """How a conversation ended that its own text brought to an end. Raises Refusal for any other
    failure."""
    match failure.kind:
        case kind if kind == CUT_THOUGHT:
            return "length"
        case "content filter" | "refusal":
            return "content_filter"
        case "context" | "context overflow":
            said = f"messages: {failure.reason}; a request lowers the limit by max_tokens"
            raise Refusal(400, said, param="messages", code="context_length_exceeded")
    status = 500 if failure.policy else 502
    raise Refusal(status, f"the conversation failed: {failure.reason}", code="failed")
