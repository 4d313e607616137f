"""Plays a protocol over many problems at once and returns the episodes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from satune.files.interrupts import uninterrupted
from satune.play.conversation import Talk, together
from satune.thoughts import answer_part
from satune.types import (
    Completion,
    Engine,
    Episode,
    Grade,
    Key,
    Message,
    Problem,
    Prompt,
    Sampling,
    Seat,
    StepResult,
    Task,
    TeamProtocol,
    UserError,
)

__all__ = [
    "Job", "Talk", "play", "play_jobs", "rollout", "rollout_sync", "run_alone",
]  # fmt: skip

_T = TypeVar("_T")
Progress = Callable[[int, int], None]
Keep = Callable[[Episode], None]


async def play(
    problem: Problem,
    key: Key,
    *,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
) -> Episode:
    """One conversation, from the problem to its grade. ``key`` gives the sample's number; the
    problem's id is filled in.

    With ``task.environment(problem, rng, generate)`` the protocol is called once for every action
    until the environment is done. The engine is told of the end also after a failure.

    Raises UserError if the protocol's answer is not text, the environment's reply is not a
    StepResult, no seat speaks before an action, or a grade lies outside [0, 1].
    """
    key = key.at(problem=problem.id)
    _check_seats(seats)
    engine.begin(key)
    try:
        return await _converse(problem, key, seats, protocol, engine, task)
    finally:
        engine.end(key)


async def rollout(
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
    progress: Progress | None = None,
    concurrency: int | None = None,
    finished: Mapping[tuple[str, int], Episode] | None = None,
    keep: Keep | None = None,
) -> list[Episode]:
    """``samples`` episodes of each problem, ordered by problem, then by sample.

    ``progress(done, total)`` is called after each episode. Unless ``concurrency`` bounds how many
    conversations are open at a time, the engine has been told of every one before the first
    starts: a local engine waits for all open ones before it decodes a batch.

    ``finished`` holds episodes of an earlier call by problem id and sample, which are not played
    again; ``keep`` is given each one that is played, as soon as it has ended.

    The first failure cancels the rest and is raised as it is. Raises UserError for two problems
    with one id, for ``samples`` or ``concurrency`` below 1, and as ``play``.
    """
    _check_seats(seats)
    if samples < 1:
        raise UserError(f"rollout: samples is {samples}; give at least 1")
    if concurrency is not None and concurrency < 1:
        raise UserError(f"rollout: concurrency is {concurrency}; give at least 1, or leave it out")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"rollout: two problems have the id {problem.id!r}; make ids unique")
        seen.add(problem.id)

    had = finished or {}
    wanted = [
        Job(problem, key.at(problem=problem.id, sample=sample), seats, engine)
        for problem in problems
        for sample in range(samples)
    ]
    jobs = [job for job in wanted if (job.problem.id, job.key.sample) not in had]
    before = len(wanted) - len(jobs)

    def shown(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, len(wanted))

    played = await play_jobs(
        jobs, protocol=protocol, task=task, progress=shown, concurrency=concurrency, keep=keep
    )
    known = {**had, **{(episode.problem.id, episode.sample): episode for episode in played}}
    return [known[job.problem.id, job.key.sample] for job in wanted]


@dataclass(frozen=True, slots=True)
class Job:
    """One conversation to be played: its problem, its whole key, who sits where and who writes."""

    problem: Problem
    key: Key
    seats: Sequence[Seat]
    engine: Engine


async def play_jobs(
    jobs: Sequence[Job],
    *,
    protocol: TeamProtocol,
    task: Task,
    progress: Progress | None = None,
    concurrency: int | None = None,
    keep: Keep | None = None,
) -> list[Episode]:
    """The episodes of ``jobs`` in their order, as ``rollout`` plays them: episodes of one call may
    differ in who sits where. No two jobs of one engine have equal keys."""
    gate = asyncio.Semaphore(concurrency) if concurrency is not None else None
    opened: dict[int, Job] = {}
    done = 0

    def begin(number: int) -> None:
        jobs[number].engine.begin(jobs[number].key)
        opened[number] = jobs[number]

    def end(number: int) -> None:
        job = opened.pop(number)
        job.engine.end(job.key)

    async def one(number: int) -> Episode:
        nonlocal done
        job = jobs[number]
        try:
            episode = await _converse(job.problem, job.key, job.seats, protocol, job.engine, task)
        finally:
            end(number)
        done += 1
        if keep is not None:
            keep(episode)
        if progress is not None:
            progress(done, len(jobs))
        return episode

    async def gated(number: int, gate: asyncio.Semaphore) -> Episode:
        async with gate:
            begin(number)
            return await one(number)

    try:
        if gate is not None:
            return await together([gated(number, gate) for number in range(len(jobs))])
        for number in range(len(jobs)):
            begin(number)
        return await together([one(number) for number in range(len(jobs))])
    finally:
        # Begun but never started: a later begin failed, or the task was cancelled before its first
        # step and so never reached its own finally.
        for number in list(opened):
            end(number)


def rollout_sync(
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
    progress: Progress | None = None,
    concurrency: int | None = None,
) -> list[Episode]:
    """``rollout`` in an event loop of its own, for callers that are not coroutines."""
    return run_alone(
        lambda: rollout(
            problems,
            samples,
            key,
            seats=seats,
            protocol=protocol,
            engine=engine,
            task=task,
            progress=progress,
            concurrency=concurrency,
        ),
        [engine],
    )


def run_alone(work: Callable[[], Coroutine[Any, Any, _T]], engines: Sequence[Engine]) -> _T:
    """What ``work`` gives, in an event loop of its own; the engines are closed at its end. Ctrl-C
    cancels what is under way; it never finds the loop half made or half closed."""
    asked = False
    cancel: Callable[[], object] = lambda: None  # noqa: E731

    async def whole() -> _T:
        nonlocal cancel
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        cancel = lambda: loop.call_soon_threadsafe(task.cancel)  # noqa: E731
        if asked:
            raise asyncio.CancelledError
        try:
            return await work()
        finally:
            cancel = lambda: None  # noqa: E731
            for engine in engines:
                await engine.close()

    def ask() -> None:
        nonlocal asked
        asked = True
        cancel()

    with uninterrupted(ask):
        try:
            return asyncio.run(whole())
        except asyncio.CancelledError:
            pass
    raise KeyboardInterrupt


async def _converse(
    problem: Problem,
    key: Key,
    seats: Sequence[Seat],
    protocol: TeamProtocol,
    engine: Engine,
    task: Task,
) -> Episode:
    make_environment = getattr(task, "environment", None)
    talk = Talk(
        problem, key, seats=seats, engine=engine, task=task, acting=make_environment is not None
    )
    environment_tokens = 0
    calls = 0

    async def generate(messages: Sequence[Message], sampling: Sampling) -> Completion:
        nonlocal environment_tokens, calls
        own = key.at(purpose="environment", seat="environment", own_index=calls)
        calls += 1
        prompt = Prompt(tuple(messages))
        completion = await engine.generate("environment", prompt, sampling, own)
        environment_tokens += completion.prompt_tokens + completion.completion_tokens
        return completion

    if make_environment is None:
        answer = _checked_answer(await protocol(talk))
        grade = task.grade(problem, answer)
    else:
        environment = make_environment(problem, key.rng("environment"), generate)
        while True:
            before = len(talk.turns)
            answer = _checked_answer(await protocol(talk))
            if len(talk.turns) == before:
                raise UserError("protocol: no seat spoke before the action; let one say something")
            result = await environment.step(answer)
            if not isinstance(result, StepResult):
                raise UserError(
                    f"task {task.name}: environment.step gave a {type(result).__name__}; "
                    "return a StepResult"
                )
            talk.observe(result.text, to=result.seats)
            if result.done:
                break
        grade = result.grade if result.grade is not None else task.grade(problem, answer)
    _check_grade(grade, problem, task, talk.seats)
    return Episode(
        problem=problem,
        sample=key.sample,
        turns=tuple(talk.turns),
        answer=answer,
        grade=grade,
        observations=tuple(talk.observations),
        environment_tokens=environment_tokens,
    )


def _checked_answer(answer: Any) -> str | None:
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"protocol: its answer is a {type(answer).__name__}; return text or None")
    # A thought that never ended is no answer, whatever the task would read in it.
    return None if answer is None or answer_part(answer) is None else answer


def _check_seats(seats: Sequence[Seat]) -> None:
    names = [seat.name for seat in seats]
    if not names:
        raise UserError("team: it has no seats; give at least one")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"team: two seats are named {name!r}; make their names unique")


def _check_grade(grade: Grade, problem: Problem, task: Task, seats: Sequence[str]) -> None:
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
