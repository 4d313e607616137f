"""One conversation as a protocol sees it.

What a seat sees (the rules that tests/play/test_conversation.py locks):

1. The problem comes first, then everything in the order it happened.
2. A seat's own messages are "own", other seats' messages "foreign" with the writer's name.
3. Seats active in the same moment do not see each other's message of that moment; afterwards
   every seat sees all of them, in the order in which the protocol named the seats.
4. An instruction is seen only by the seat it was given to, before the message it asked for.
5. An observation is seen by every seat, or by those it was addressed to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from satune.types import (
    Engine,
    Entry,
    EpisodeFailure,
    Key,
    Problem,
    Seat,
    Task,
    Turn,
    UserError,
    View,
)

_T = TypeVar("_T")


class Conversation:
    """One conversation of the seats on one problem: the ``types.Conversation`` of a protocol.

    ``rng`` serves the protocol's own draws; it depends on the key only, so that it is the same
    whatever else is being played. Draw a route before the first message. ``keep_ids`` False gives
    turns without ids and log-probabilities, which only training reads. ``on_turn`` is given each
    turn at the end of its moment.
    """

    def __init__(
        self,
        problem: Problem,
        key: Key,
        *,
        seats: Sequence[Seat],
        engine: Engine,
        task: Task,
        acting: bool = False,
        keep_ids: bool = True,
        on_turn: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        self.problem = problem
        self.acting = acting
        self.seats: tuple[str, ...] = tuple(seat.name for seat in seats)
        self.turns: list[Turn] = []
        self.observations: list[tuple[int, str]] = []
        self.rng: random.Random = key.rng("protocol")
        self._key = key
        self._by_name = {seat.name: seat for seat in seats}
        self._engine = engine
        self._task = task
        self._keep_ids = keep_ids
        self._on_turn = on_turn
        self._views: dict[str, View] = {}
        # Who sees an entry (None: everybody) beside the entry as its readers but its writer see it.
        self._log: list[tuple[tuple[str, ...] | None, Entry]] = [
            (None, Entry("problem", parts=problem.prompt))
        ]
        self._speaking = False

    async def say(self, seat: str, instruction: str | None = None) -> Turn:
        """One seat's next message. Raises UserError for a seat that is not in the team."""
        return (await self.all_say([seat], instruction))[0]

    async def all_say(
        self, seats: Sequence[str], instruction: str | Mapping[str, str] | None = None
    ) -> list[Turn]:
        """One message of each of these seats, all in one moment; ``instruction`` is for all of
        them, or maps some of them to theirs. Turns come in the order of ``seats``.

        Raises UserError for an unknown seat, for a seat named twice in one moment, for an
        instruction to a seat that does not speak, and for a call while another is under way.
        """
        self._check(seats)
        if len(set(seats)) < len(seats):
            raise UserError(f"protocol: a seat is named twice in one moment: {', '.join(seats)}")
        if self._speaking:
            raise UserError(
                "protocol: say was called while another message is being written; "
                "use all_say for seats that speak together"
            )
        told: Mapping[str, str] = (
            instruction
            if isinstance(instruction, Mapping)
            else {}
            if instruction is None
            else dict.fromkeys(seats, instruction)
        )
        self._check(told, among=seats)
        for seat in seats:
            if seat in told:
                self._log.append(((seat,), Entry("instruction", told[seat])))
        self._speaking = True
        try:
            written = await together([self._write(seat) for seat in seats])
        finally:
            self._speaking = False
        for turn in written:
            self.turns.append(turn)
            self._log.append((None, Entry("foreign", turn.text, turn.seat)))
            self._on_turn(turn)
        return written

    def observe(self, text: str, to: Sequence[str] | None = None) -> None:
        """Show a text to every seat, or to the seats ``to``. An empty text is not shown."""
        if to is not None:
            self._check(to)
        if text:
            self._log.append((None if to is None else tuple(to), Entry("observation", text)))
            self.observations.append((len(self.turns), text))

    def entries(self, seat: str) -> list[Entry]:
        """The transcript as one seat sees it."""
        return [
            Entry("own", entry.text, seat) if entry.seat == seat else entry
            for readers, entry in self._log
            if readers is None or seat in readers
        ]

    def extract(self, text: str) -> str | None:
        """The answer in a message, as the task reads it. Raises EpisodeFailure if the task cannot
        read it."""
        with on_its_text("grader"):
            return self._task.extract(text)

    def majority(self, turns: Sequence[Turn]) -> str | None:
        """The text of the first turn whose answer won most votes; None if no turn has an answer.

        Answers are grouped by the task's equality with a class's first answer; a tie goes to the
        class whose first turn came first. Turns without an answer have no vote. Raises
        EpisodeFailure if the task cannot read or compare what was said.
        """
        with on_its_text("grader"):
            winner = plurality([turn.text for turn in turns], self._task)
        return None if winner is None else turns[winner].text

    async def _write(self, name: str) -> Turn:
        seat = self._by_name[name]
        if name not in self._views:
            self._views[name] = seat.renderer.view(name)
        view = self._views[name]
        own_index = sum(turn.seat == name for turn in self.turns)
        moment = self.turns[-1].moment + 1 if self.turns else 0
        prompt = view.prompt(self.entries(name), seat.sampling.max_new_tokens)
        key = self._key.at(seat=name, own_index=own_index)
        completion = await self._engine.generate(name, prompt, seat.sampling, key)
        view.wrote(completion)
        return Turn(
            seat=name,
            agent=seat.agent,
            moment=moment,
            own_index=own_index,
            text=prompt.opening + completion.text,
            finish_reason=completion.finish_reason,
            version=completion.version,
            prompt_ids=prompt.ids if self._keep_ids else None,
            completion_ids=completion.ids if self._keep_ids else None,
            sampled_logprobs=completion.logprobs if self._keep_ids else None,
            dropped=prompt.dropped + completion.dropped,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            handle=completion.handle if self._keep_ids else None,
        )

    def _check(self, names: Iterable[str], among: Sequence[str] | None = None) -> None:
        allowed = self.seats if among is None else among
        for name in names:
            if name not in allowed:
                where = "seats" if among is None else "seats speaking here"
                raise UserError(
                    f"protocol: no seat {name!r}; the {where} are {', '.join(allowed) or 'none'}"
                )


@contextmanager
def on_its_text(
    kind: str, spared: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """What is raised in the block came of what the policy wrote: it becomes an EpisodeFailure of
    the policy, of that ``kind``. A UserError or a failure stays what it is, and so does what
    ``spared`` is true of."""
    try:
        yield
    except (UserError, EpisodeFailure):
        raise
    except Exception as error:
        if spared(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise EpisodeFailure(f"{kind}: {said}", policy=True) from error


def plurality(texts: Sequence[str], task: Task) -> int | None:
    """Index of the first text whose answer has most votes; see ``Conversation.majority``."""
    classes: list[tuple[str, list[int]]] = []
    for index, text in enumerate(texts):
        answer = task.extract(text)
        if answer is None:
            continue
        for first, members in classes:
            # Many samples say the same, and a task's equality may be slow.
            if first == answer or task.equal(first, answer):
                members.append(index)
                break
        else:
            classes.append((answer, [index]))
    if not classes:
        return None
    # max() keeps the first of equals, and classes stand in the order of their first turn.
    return max(classes, key=lambda item: len(item[1]))[1][0]


async def together(jobs: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Results in order. The first failure (the earliest job's, if several failed at once) cancels
    the others, waits until they have ended, and is raised as it is."""
    if not jobs:
        return []
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((t for t in tasks if t.done() and not t.cancelled() and t.exception()), None)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failed is not None:
        failed.result()
    return [task.result() for task in tasks]
