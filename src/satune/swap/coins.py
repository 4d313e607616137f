"""Episodes of two teams on one task by coin: what a hand-over plays.

A team is the match that it plays; a seat of it may be anything that an engine can speak for, a
served model among them. Both matches have one task and one protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from satune.core.confidence import Spending
from satune.play.match import Match
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
from satune.types import Episode, Key, Problem


def hand_over_between(
    old: Match,
    new: Match,
    settings: HandOverSettings,
    key: Key,
    spending: Spending,
    *,
    offset: int = 0,
    watch: Callable[[Look], None] = lambda look: None,
) -> HandOver:
    """The ramp from one team to another on the task's problems for certificates; both sides play an
    episode with the same uniforms."""

    def play(pairs: Pairs, at: Key) -> tuple[list[Episode], list[Episode]]:
        chosen = [(problem, sample) for problem, samples in pairs for sample in samples]
        # One after the other: an engine that serves both knows an episode by its key.
        first, second = (
            _played([Job(match, p, at.at(problem=p.id, sample=s)) for p, s in chosen])
            for match in (old, new)
        )
        return first, second

    return hand_over(
        lambda count, start: draw(old.task, "certify", count, start),
        play,
        settings,
        key,
        spending,
        offset=offset,
        held_out="fresh" if getattr(old.task, "fresh", False) else "finite",
        watch=watch,
    )


def play_mixture(
    old: Match,
    new: Match,
    problems: Sequence[Problem],
    samples: int,
    key: Key,
    epsilon: float,
) -> list[tuple[Episode, bool]]:
    """Episodes of the mixture, each with its coin: whether the newcomers spoke in it."""
    at = [(p, key.at(problem=p.id, sample=s)) for p in problems for s in range(samples)]
    coins = [newcomer_speaks(each, epsilon) for _, each in at]
    jobs = [
        Job(new if coin else old, problem, each)
        for (problem, each), coin in zip(at, coins, strict=True)
    ]
    return list(zip(_played(jobs), coins, strict=True))


def _played(jobs: Sequence[Job]) -> list[Episode]:
    engines = list({id(job.match.engine): job.match.engine for job in jobs}.values())
    return run_alone(lambda: play_jobs(jobs, label="hand-over"), engines)
