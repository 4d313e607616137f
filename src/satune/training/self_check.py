"""Before the first update every ratio is 1 and every KL 0, or the run stops (THEORY §6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from satune.agents.ports import Learner
from satune.training.ascent import own_turns
from satune.training.ports import Agents, Host
from satune.types import Episode, UserError


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What rounding of the compute type may make of a token's log-probability (nats): on average,
    and at the worst of many thousand tokens."""

    mean: float
    largest: float


def self_check(
    learners: Agents, episodes: Sequence[Episode], tolerance: Tolerance
) -> dict[str, dict[str, float]]:
    """Hold learner against engine on episodes that the present weights wrote.

    Per agent: ``ratio`` the largest |log r| between two scorings, ``kl`` the largest exact KL,
    ``mismatch_mean`` the mean of sampled minus written, ``mismatch_size`` the mean of its absolute
    value and ``mismatch_max`` the largest. Raises UserError, one line, where one is too large.
    """
    report: dict[str, dict[str, float]] = {}
    for name, learner in learners.items():
        figures = held_against(learner, name, episodes)
        if figures is None:
            continue
        report[name] = figures
        limits = {
            "ratio": tolerance.largest,
            "kl": tolerance.largest,
            "mismatch_size": tolerance.mean,
            "mismatch_max": tolerance.largest,
        }
        for what, limit in limits.items():
            if not figures[what] <= limit:
                raise UserError(_explanation(name, what, figures[what], limit))
    return report


def held_against(
    learner: Learner | Host, agent: str, episodes: Sequence[Episode]
) -> dict[str, float] | None:
    """The figures of one agent, as ``self_check`` reports them; None where it wrote nothing. Raises
    UserError where the engine gave no log-probabilities."""
    if isinstance(learner, Host):
        return learner.check(episodes)
    packed = own_turns(agent, episodes)
    if packed.tokens == 0:
        return None
    anchor = learner.anchor(packed)
    learner.complete(anchor)
    again = learner.measure(anchor)
    if packed.sampled_T is None:
        raise UserError(
            f"self-check: agent {agent}: the engine gives no log-probabilities of what it "
            "samples; take another engine"
        )
    difference_T = packed.sampled_T.double() - anchor.logprobs_T.double()
    return {
        "ratio": float((again.logprobs_T - anchor.logprobs_T).abs().max()),
        "kl": float(torch.maximum(again.kl_T, again.reverse_kl_T).max()),
        "mismatch_mean": float(difference_T.mean()),
        "mismatch_size": float(difference_T.abs().mean()),
        "mismatch_max": float(difference_T.abs().max()),
    }


def _explanation(agent: str, what: str, value: float, tolerance: float) -> str:
    meaning: dict[str, Any] = {
        "ratio": "two scorings of one token differ",
        "kl": "the KL to itself is not 0",
        "mismatch_size": "engine and learner differ on average,",
        "mismatch_max": "engine and learner give one token different log-probabilities",
    }
    return (
        f"self-check: agent {agent}: {meaning[what]} by {value:.3g} nats (allowed {tolerance:g}); "
        "compute in float32, or check that the engine serves the learner's weights and temperature"
    )
