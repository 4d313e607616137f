"""Grading beside decoding: no grader holds up the event loop, and several grade at a time."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from satune.play.conversation import on_its_text, plurality
from satune.types import EpisodeFailure, Grade, Problem, Task, UserError

GRADERS = 16
"""Messages that are graded at a time. They mostly wait: for a process, for a judge elsewhere."""

REGRADED = 2
"""How often a message is graded anew whose grader's own process died."""


class Graders:
    """Calls a task's graders, at most ``limit`` at a time. One for an event loop.

    A plain ``grade`` runs in a thread of its own, so that nothing of it is pickled; a coroutine
    function is awaited. What may hang or crash the interpreter belongs into a process
    (``tasks.pool``), for which the thread then waits. A call that takes longer than ``seconds`` is
    given up: its thread is left behind and ends with the program.
    """

    def __init__(self, task: Task, seconds: float, limit: int = GRADERS) -> None:
        self.task = task
        self.seconds = seconds
        self._gate = asyncio.Semaphore(limit)

    async def grade(self, problem: Problem, answer: str | None, seats: Sequence[str]) -> Grade:
        """The task's grade of a message, which may credit ``seats``.

        Raises EpisodeFailure: the policy's, if the grader raises or takes too long over its text;
        the world's, if the grader's process died again and again. Raises UserError for a grade
        outside [0, 1] or one that credits another seat, and what the grader raises as such.
        """
        died = 0
        while True:
            try:
                grade = await self._called(self.seconds, self.task.grade, problem, answer)
            except EpisodeFailure as failure:
                died += 1
                if failure.policy or died > REGRADED:
                    raise
            else:
                check_grade(grade, problem, self.task, seats)
                return grade

    async def elect(self, texts: Sequence[str]) -> int | None:
        """``conversation.plurality`` of the texts, beside all else. Raises as ``grade``."""
        # It compares answers up to once a text.
        seconds = self.seconds * max(1, len(texts))
        return await self._called(seconds, plurality, texts, self.task)

    async def _called(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        async with self._gate:
            limit = asyncio.timeout(seconds)
            with on_its_text("grader"):
                try:
                    async with limit:
                        return await _beside(function, *arguments)
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    raise TimeoutError(f"no result within {seconds:g} s") from error


async def _beside(function: Callable[..., Any], *arguments: Any) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    result = await in_thread(function, *arguments)
    return await result if inspect.isawaitable(result) else result


def in_thread(function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    """The function's result, from a thread that the program does not wait for when it ends:
    executors do, and a grader that hangs would then keep the program from ending."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failed = None, None
        try:
            result = context.run(function, *arguments)
        except BaseException as error:
            # No future takes a StopIteration, and a grader's sys.exit() is not the program's.
            plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            failed = error if plain else RuntimeError(repr(error))
        with suppress(RuntimeError):  # the loop is closed: whoever asked gave up
            loop.call_soon_threadsafe(deliver, result, failed)

    threading.Thread(target=work, name="satune-grader", daemon=True).start()
    return future


def check_grade(grade: Any, problem: Problem, task: Task, seats: Sequence[str]) -> None:
    """Raises UserError for what is no grade, lies outside [0, 1] or credits an unknown seat."""
    if not isinstance(grade, Grade):
        raise UserError(
            f"task {task.name}: its grade of {problem.id!r} is a {type(grade).__name__}; "
            "return a Grade"
        )
    credits = {} if grade.seats is None else grade.seats
    for seat in credits:
        if seat not in seats:
            raise UserError(
                f"task {task.name}: its grade of {problem.id!r} credits the seat {seat!r}; "
                f"the seats are {', '.join(seats)}"
            )
    for score in (grade.score, *credits.values()):
        if not math.isfinite(score) or not 0.0 <= score <= 1.0:
            raise UserError(
                f"task {task.name}: its grade of {problem.id!r} is {score}; "
                "grades must lie in [0, 1]: rescale them"
            )
