"""A seat handed over by coin: what ``swap.handover`` needs played."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from satune.assembly import Cast
from satune.core.confidence import Spending
from satune.rollout import Job, play_jobs
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
    old: Cast,
    new: Cast,
    settings: HandOverSettings,
    key: Key,
    spending: Spending,
    *,
    offset: int = 0,
    watch: Callable[[Look], None] = lambda look: None,
) -> HandOver:
    """The ramp from one team to another on the task's problems for certificates."""

    def play(pairs: Pairs, at: Key) -> tuple[list[Episode], list[Episode]]:
        chosen = [(problem, sample) for problem, samples in pairs for sample in samples]
        return _play(old, chosen, at), _play(new, chosen, at)

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
    old: Cast, new: Cast, problems: Sequence[Problem], samples: int, key: Key, epsilon: float
) -> list[tuple[Episode, bool]]:
    """Episodes of the mixture, each with its coin: whether the newcomers spoke in it."""
    at = [(p, key.at(problem=p.id, sample=s)) for p in problems for s in range(samples)]
    coins = [newcomer_speaks(each, epsilon) for _, each in at]
    sides = {True: new, False: old}
    jobs = [
        Job(problem, each, _seats(sides[coin]), sides[coin].engine)
        for (problem, each), coin in zip(at, coins, strict=True)
    ]
    return list(zip(_played(old, jobs), coins, strict=True))


def _play(cast: Cast, chosen: Sequence[tuple[Problem, int]], key: Key) -> list[Episode]:
    seats = _seats(cast)
    jobs = [Job(p, key.at(problem=p.id, sample=s), seats, cast.engine) for p, s in chosen]
    return _played(cast, jobs)


def _seats(cast: Cast) -> Any:
    return cast.team.seats_for(cast.recipe.rollout.max_new_tokens)


def _played(cast: Cast, jobs: Sequence[Job]) -> list[Episode]:
    return asyncio.run(
        play_jobs(
            jobs,
            protocol=cast.protocol,
            task=cast.task,
            progress=lambda done, total: cast.progress(done, total, "hand-over"),
        )
    )
