"""What an evaluation says while a run goes on: the held-out reward, and what was gained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from satune.files.events import count_failures
from satune.play.evaluation import Evaluation, figures_of
from satune.play.statistics import mean_estimate


def progress_of(evaluation: Evaluation, before: Sequence[float] | None) -> dict[str, Any]:
    """What the event of an evaluation in training says; ``before``: the ``per_problem`` of an
    earlier one on the same problems, from which the paired ``difference`` is taken.

    Where problems name a group, ``groups`` says the same of each group alone."""
    team = evaluation.team
    rewards_P = team.by_problem

    def told(places: Sequence[int]) -> dict[str, Any]:
        reward = mean_estimate([rewards_P[i] for i in places], 0.0, 1.0)
        return {"reward": reward.mean, "interval": reward.interval, "problems": len(places)}

    def gained(places: Sequence[int]) -> dict[str, Any]:
        if before is None:
            return {}
        gain = mean_estimate([rewards_P[i] - before[i] for i in places], -1.0, 1.0)
        return {"difference": [gain.mean, gain.low, gain.high]}

    everywhere = range(len(rewards_P))
    figures = figures_of(team)
    del figures["avg_at_k"], figures["interval"]
    found = {
        **told(everywhere),
        "samples": team.samples,
        "per_problem": rewards_P,
        "tokens": evaluation.tokens,
        "failures": count_failures(evaluation.episodes),
        "figures": figures,
        **gained(everywhere),
    }
    groups = {name: told(places) | gained(places) for name, places in evaluation.groups.items()}
    return found | ({"groups": groups} if groups else {})
