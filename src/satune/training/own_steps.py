"""The own steps of a change, and the bounds that they give (THEORY §4, §8).

Shape suffixes: ``T`` own tokens, ``E`` episodes, ``H`` own steps of an episode. An own step is a
moment in which an agent that changed speaks; agents that share one are one step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from satune.agents.anchor import Snapshot
from satune.agents.ports import Learner
from satune.core.advantages import group_advantages
from satune.core.horizon_bounds import (
    largest_gain,
    penalty_horizon,
    penalty_one_turn,
    penalty_sup_free,
    prefix_tv,
)
from satune.core.theory import PAPER, PAPER_REGION, SUP_FREE, penalty_paper, theory_row
from satune.core.trust_region import TrustRegionSettings
from satune.core.variation import tv_from_kl
from satune.training.advantages import groups
from satune.training.ascent import own_turns
from satune.training.change import Change, undone
from satune.training.ports import Host, TurnSums
from satune.types import Episode

ONE_TURN, TURNS = "one own turn", "turns"
PAPER_GAMMA = 0.99
"""The paper's discount; its penalty has no form without one."""


@dataclass(frozen=True, slots=True)
class OwnSteps:
    """log(new/old) and KL(old‖new) of each own step [E, H], 0 where an episode has fewer, and the
    largest KL(old‖new) of a token state."""

    log_ratio_EH: Tensor
    kl_EH: Tensor
    largest_token_kl: float

    @property
    def own(self) -> int:
        """The most own steps of an episode."""
        return self.kl_EH.shape[1]


def measure_own_steps(change: Change, episodes: Sequence[Episode]) -> OwnSteps:
    """Log-ratios and exact KL(old‖new) of a change's own steps, on the old team's ``episodes``.

    The new weights are in place before and after.
    """
    moments = [_own_moments(e, change.learners) for e in episodes]
    longest = max((len(m) for m in moments), default=0)
    shape = (len(episodes), longest)
    log_ratio_EH = torch.zeros(shape, dtype=torch.float64)
    kl_EH = torch.zeros(shape, dtype=torch.float64)
    largest = 0.0
    for name, learner in change.learners.items():
        sums = turn_sums(learner, change.held[name].snapshot, name, episodes)
        if sums.log_ratio_K.numel():
            place_K = _places(name, episodes, moments, longest)
            log_ratio_EH.view(-1).index_add_(0, place_K, sums.log_ratio_K)
            kl_EH.view(-1).index_add_(0, place_K, sums.kl_K)
            largest = max(largest, sums.largest_token_kl)
    return OwnSteps(log_ratio_EH, kl_EH, largest)


def turn_sums(
    learner: Learner | Host, before: Snapshot, agent: str, episodes: Sequence[Episode]
) -> TurnSums:
    """What the change from ``before`` to the present weights did to each of the agent's own turns,
    by exact KL over the vocabulary. The present weights are in place before and after."""
    if isinstance(learner, Host):
        return learner.turn_sums(before, episodes)
    packed = own_turns(agent, episodes)
    log_ratio_K, kl_K = (torch.zeros(packed.turns, dtype=torch.float64) for _ in range(2))
    if packed.tokens == 0:
        return TurnSums(log_ratio_K, kl_K, 0.0)
    with undone(learner, before):
        anchor = learner.anchor(packed, before.weights)
        learner.complete(anchor)
    measured = learner.measure(anchor)
    difference_T = measured.logprobs_T.double() - anchor.logprobs_T.double()
    kl_T = measured.reverse_kl_T.double().clamp(min=0)
    log_ratio_K.index_add_(0, packed.turn_T, difference_T)
    kl_K.index_add_(0, packed.turn_T, kl_T)
    return TurnSums(log_ratio_K, kl_K, float(kl_T.max()))


def _own_moments(episode: Episode, agents: Mapping[str, object]) -> dict[int, int]:
    """The moments in which one of the agents speaks, each with its place among them."""
    spoken = sorted({turn.moment for turn in episode.turns if turn.agent in agents})
    return {moment: place for place, moment in enumerate(spoken)}


def _places(
    agent: str, episodes: Sequence[Episode], moments: Sequence[Mapping[int, int]], longest: int
) -> Tensor:
    """Where each of the agent's turns lies in a flat [E, H]."""
    return torch.tensor(
        [
            index * longest + moments[index][turn.moment]
            for index, episode in enumerate(episodes)
            for turn in episode.turns
            if turn.agent == agent
        ]
    )


def theory_rows(
    episodes: Sequence[Episode], steps: OwnSteps, region: TrustRegionSettings | None
) -> list[dict[str, Any]]:
    """The bounds that episodes can speak to, a row each with the gain's standard error (THEORY §4).

    The gain is the estimate of L = Σ_h (r_h - 1)(R - b) on the old team's episodes, b the mean
    reward of the problem's other episodes (½ where there is none). Penalties are made of what was
    measured of the change. Every row is a plug-in: an estimate of what would have to be known
    exactly; its ``basis`` names that. ``region`` is the trust region that held the change, if it is
    that of one step: what the paper says of every change inside δ then has a row of its own.
    """
    gain_P = _by_problem(_gains(episodes, steps), episodes)
    gain, problems = float(gain_P.mean()), gain_P.numel()
    kl_H = _by_problem(steps.kl_EH, episodes).mean(0)
    largest = steps.largest_token_kl
    penalties = {
        SUP_FREE: (penalty_sup_free(steps.log_ratio_EH), "measured: mean over ratios"),
        PAPER: (
            penalty_paper(PAPER_GAMMA, 1.0, largest),
            f"measured: the largest KL(old‖new) seen of a token, {largest:.3g}, as its supremum",
        ),
    }
    if region is not None:
        penalties[PAPER_REGION] = (
            penalty_paper(PAPER_GAMMA, 1.0, region.delta),
            f"enforced: delta {region.delta:g}, which holds the {region.quantile:g} quantile of "
            f"KL(new‖old) by {region.unit}, as the supremum of KL(old‖new)",
        )
    if steps.own <= 1:
        seen = f"measured: none of {len(episodes)} episodes has a second own turn"
        penalties[ONE_TURN] = (penalty_one_turn(steps.own), seen)
    else:
        # A supremum cannot be seen; the largest turn that was stands in for it.
        tv_H = tv_from_kl(steps.kl_EH.amax(0))
        penalties[TURNS] = (
            penalty_horizon(tv_H, prefix_tv(mean_kl_H=kl_H)),
            "measured: the largest KL(old‖new) seen of each own turn as its supremum, and the mean"
            " KL before it",
        )
    most = float(largest_gain(kl_H.sum()))
    error = float(gain_P.std()) / math.sqrt(problems) if problems > 1 else None
    rows = [
        theory_row(name, gain, float(penalty), plug_in=True, largest_gain=most, basis=basis)
        for name, (penalty, basis) in penalties.items()
    ]
    return [row.to_dict() | {"gain_standard_error": error} for row in rows]


def _gains(episodes: Sequence[Episode], steps: OwnSteps) -> Tensor:
    """Σ_h (r_h - 1)(R - b) of each episode [E]."""
    rewards_E = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    group_E = groups(episodes)
    compared_E = torch.bincount(group_E)[group_E] > 1
    centred_E = rewards_E - 0.5
    centred_E[compared_E] = group_advantages(
        rewards_E[compared_E],
        group_E[compared_E],
        baseline="leave_one_out",
        normalise=False,
        clip=None,
    )
    return torch.expm1(steps.log_ratio_EH).sum(-1) * centred_E


def _by_problem(values_E: Tensor, episodes: Sequence[Episode]) -> Tensor:
    """Means over each problem's episodes, [E, ...] to [P, ...]."""
    group_E = groups(episodes)
    count_P = torch.bincount(group_E)
    total_P = values_E.new_zeros(count_P.numel(), *values_E.shape[1:])
    total_P.index_add_(0, group_E, values_E)
    return total_P / count_P.reshape(-1, *[1] * (values_E.dim() - 1))
