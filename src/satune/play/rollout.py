"""Plays a protocol over many problems at once and returns the episodes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from satune.files.interrupts import uninterrupted
from satune.play.conversation import together
from satune.play.episode import CUT_THOUGHT, Played, converse, graded, play
from satune.play.grading import Graders
from satune.play.match import Match
from satune.types import Engine, Episode, Failure, Key, Problem, UserError

__all__ = [
    "Job", "Match", "Tally", "play", "play_jobs", "rollout", "rollout_sync", "run_alone",
]  # fmt: skip

_T = TypeVar("_T")
Keep = Callable[[Episode], None]
End = Callable[[], None]
"""Ends, from any thread, what is being played."""


async def rollout(
    match: Match,
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    label: str = "rollout",
    finished: Mapping[tuple[str, int], Episode] | None = None,
    keep: Keep | None = None,
    name: Callable[[Problem], str] = lambda problem: problem.id,
) -> list[Episode]:
    """``samples`` episodes of each problem, ordered by problem, then by sample.

    ``label`` says to the match's ``progress``, with the mean reward so far, and to whoever reads an
    error, what is played.
    ``finished`` holds episodes of an earlier call by problem id and sample, which are not played
    again; ``keep`` is given each one that is played, as soon as it is graded. ``name`` is what a
    problem's keys call it.

    Raises UserError for two problems with one id or name, for ``samples`` below 1, and as
    ``play_jobs``.
    """
    if samples < 1:
        raise UserError(f"rollout: samples is {samples}; give at least 1")
    seen: set[str] = set()
    names: dict[str, str] = {}
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"rollout: two problems have the id {problem.id!r}; make ids unique")
        seen.add(problem.id)
        same = names.setdefault(name(problem), problem.id)
        if same != problem.id:
            raise UserError(
                f"rollout: the problems {same!r} and {problem.id!r} have the same text, and so "
                "would be drawn alike; drop one of them, or give --keys id"
            )

    had = finished or {}
    wanted = [
        Job(match, problem, key.at(problem=name(problem), sample=sample))
        for problem in problems
        for sample in range(samples)
    ]
    jobs = [job for job in wanted if (job.problem.id, job.key.sample) not in had]
    before = [had[at] for job in wanted if (at := (job.problem.id, job.key.sample)) in had]
    played = await play_jobs(jobs, label=label, before=before, keep=keep)
    known = {**had, **{(episode.problem.id, episode.sample): episode for episode in played}}
    return [known[job.problem.id, job.key.sample] for job in wanted]


@dataclass(frozen=True, slots=True)
class Job:
    """One conversation to be played: of which match, on which problem, and its whole key."""

    match: Match
    problem: Problem
    key: Key


async def play_jobs(
    jobs: Sequence[Job],
    *,
    label: str = "rollout",
    before: Sequence[Episode] = (),
    keep: Keep | None = None,
) -> list[Episode]:
    """The episodes of ``jobs`` in their order. Those of one call may be of several matches, of one
    task and told by the first one's settings; no two jobs of one engine have equal keys.

    Unless the match bounds how many conversations are open at a time, the engine has been told of
    every one before the first starts: a local engine in exact order waits for all open ones before
    it decodes a batch. It is told of a conversation's end before that is graded: the others are
    decoded meanwhile. ``before`` are episodes of an earlier call, counted with these.

    A conversation that fails is an episode with a failure. When more of them have failed than the
    match bears (always one, unless it bears none), UserError says why; any other exception cancels
    the rest and is raised as it is. Raises as ``play``.
    """
    if not jobs:
        return []
    match = jobs[0].match
    gate = None if match.concurrency is None else asyncio.Semaphore(match.concurrency)
    graders = Graders(match.task, match.grading_seconds)
    tally = Tally(match.failures, len(jobs) + len(before), label)
    opened: dict[int, Job] = {}
    for episode in before:
        tally.add(episode)

    def begin(number: int) -> None:
        jobs[number].match.engine.begin(jobs[number].key)
        opened[number] = jobs[number]

    def end(number: int) -> None:
        job = opened.pop(number)
        job.match.engine.end(job.key)

    async def one(number: int) -> Played:
        try:
            return await converse(jobs[number].match, jobs[number].problem, jobs[number].key)
        finally:
            end(number)

    async def whole(number: int) -> Episode:
        if gate is None:
            played = await one(number)
        else:
            async with gate:
                begin(number)
                played = await one(number)
        episode = await graded(played, jobs[number].match, graders)
        tally.add(episode)
        if keep is not None:
            keep(episode)
        match.progress(tally.done, tally.total, tally.told)
        return episode

    try:
        if gate is None:
            for number in range(len(jobs)):
                begin(number)
        return await together([whole(number) for number in range(len(jobs))])
    finally:
        # Begun but never started: a later begin failed, or the task was cancelled before its first
        # step and so never reached its own finally.
        for number in list(opened):
            end(number)


@dataclass(slots=True)
class Tally:
    """Counts the episodes of a rollout of ``total``, and stops it beyond ``share`` of failures.

    Thoughts that never ended are no sign of a fault, however many there are: with reward 0 the
    policy learns to end them.
    """

    share: float
    total: int
    label: str
    done: int = 0
    failed: list[Failure] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def told(self) -> str:
        """What is played, and the mean reward so far of what the world did not end."""
        heard = self.rewards
        return f"{self.label}, reward {sum(heard) / len(heard):.3f}" if heard else self.label

    def add(self, episode: Episode) -> None:
        """Raises UserError when too many have failed."""
        self.done += 1
        if not episode.masked:
            self.rewards.append(episode.reward)
        if episode.failure is None or episode.failure.kind == CUT_THOUGHT:
            return
        self.failed.append(episode.failure)
        # One alone never ends a run, however few conversations there are.
        bearable = max(1, int(self.share * self.total)) if self.share > 0 else 0
        if len(self.failed) > bearable:
            reason, times = Counter(failure.reason for failure in self.failed).most_common(1)[0]
            often = f" ({times} times)" if times > 1 else ""
            raise UserError(
                f"{self.label}: {len(self.failed)} of {self.total} conversations failed, more than "
                f"rollout.failures ({self.share:g}) allows: {reason}{often}; mend that, or raise "
                "rollout.failures"
            )


def rollout_sync(
    match: Match,
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    *,
    label: str = "rollout",
    begun: Callable[[End], None] | None = None,
) -> list[Episode]:
    """``rollout`` in an event loop of its own, for callers that are not coroutines; ``begun`` as in
    ``run_alone``."""
    played = lambda: rollout(match, problems, samples, key, label=label)  # noqa: E731
    return run_alone(played, [match.engine], begun)


def run_alone(
    work: Callable[[], Coroutine[Any, Any, _T]],
    engines: Sequence[Engine],
    begun: Callable[[End], None] | None = None,
) -> _T:
    """What ``work`` gives, in an event loop of its own; the engines are closed at its end. Ctrl-C
    cancels what is under way; it never finds the loop half made or half closed. ``begun`` is given
    what does the same from another thread; here it is raised as KeyboardInterrupt too."""
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

    if begun is not None:
        begun(ask)
    with uninterrupted(ask):
        try:
            return asyncio.run(whole())
        except asyncio.CancelledError:
            pass
    raise KeyboardInterrupt
