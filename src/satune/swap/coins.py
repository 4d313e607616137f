"""Episodes of two teams on one task by coin: what a hand-over plays.

A side is who sits where and who writes; a seat may be anything that an engine can speak for, a
served model among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from satune.core.confidence import Spending
from satune.play.rollout import Job, play_jobs, run_alone
from satune.swap.handover import (
    HandOver,
    HandOverSettings,
    Look,
    Pairs,
    hand_over,
    newcomer_speaks,
)
from satune.tasks.catalog import draw
from satune.types import Engine, Episode, Key, Problem, Seat, Task, TeamProtocol


@dataclass(frozen=True, slots=True)
class Side:
    """A team as it plays."""

    seats: Sequence[Seat]
    engine: Engine


@dataclass(frozen=True, slots=True)
class Table:
    """What both teams play. ``progress(done, total)`` is called after each episode."""

    task: Task
    protocol: TeamProtocol
    progress: Callable[[int, int], None] = lambda done, total: None

    def play(self, jobs: Sequence[Job]) -> list[Episode]:
        return run_alone(
            lambda: play_jobs(jobs, protocol=self.protocol, task=self.task, progress=self.progress),
            list({id(job.engine): job.engine for job in jobs}.values()),
        )

    def hand_over(
        self,
        old: Side,
        new: Side,
        settings: HandOverSettings,
        key: Key,
        spending: Spending,
        *,
        offset: int = 0,
        watch: Callable[[Look], None] = lambda look: None,
    ) -> HandOver:
        """The ramp from one team to another on the task's problems for certificates; both sides
        play an episode with the same uniforms."""

        def play(pairs: Pairs, at: Key) -> tuple[list[Episode], list[Episode]]:
            chosen = [(problem, sample) for problem, samples in pairs for sample in samples]
            # One after the other: an engine that serves both knows an episode by its key.
            first, second = (
                self.play(
                    [
                        Job(p, at.at(problem=p.id, sample=s), side.seats, side.engine)
                        for p, s in chosen
                    ]
                )
                for side in (old, new)
            )
            return first, second

        return hand_over(
            lambda count, start: draw(self.task, "certify", count, start),
            play,
            settings,
            key,
            spending,
            offset=offset,
            held_out="fresh" if getattr(self.task, "fresh", False) else "finite",
            watch=watch,
        )

    def play_mixture(
        self,
        old: Side,
        new: Side,
        problems: Sequence[Problem],
        samples: int,
        key: Key,
        epsilon: float,
    ) -> list[tuple[Episode, bool]]:
        """Episodes of the mixture, each with its coin: whether the newcomers spoke in it."""
        at = [(p, key.at(problem=p.id, sample=s)) for p in problems for s in range(samples)]
        coins = [newcomer_speaks(each, epsilon) for _, each in at]
        sides = {True: new, False: old}
        jobs = [
            Job(problem, each, sides[coin].seats, sides[coin].engine)
            for (problem, each), coin in zip(at, coins, strict=True)
        ]
        return list(zip(self.play(jobs), coins, strict=True))
