"""An agent's advantages by generalised advantage estimation over its own steps (THEORY §6).

An own step is a moment in which the agent speaks; whatever others do until its next one is the
world's answer to it. V is 0 after the last step, whose reward is the episode's. Agents that were
updated since the episodes were written would now answer differently: the trace of a step,
c = min(1, ratio of their messages from this step to the next), weighs its residual and all later
ones, so that

    A_k = c_k (r_k + γ V_{k+1} - V_k + γλ A_{k+1}).

Between the tokens of a turn nobody answers and c is 1. Turns of one moment each have their own
value and share what follows, whose value and advantage are means over the turns of the next step.
Shape suffixes: ``T`` own tokens, ``H`` own turns, ``S`` own steps, ``E`` episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.ports import ValueTargets
from satune.agents.specs import CriticSettings
from satune.core.advantages import gae, truncated_traces
from satune.core.ratios import capped_weights, sum_by
from satune.core.settings import Per
from satune.core.values import explained_variance
from satune.training.credit import GaeCredit
from satune.types import Episode


@dataclass(frozen=True, slots=True)
class Lesson:
    """What an update learns from an experience: an advantage and a weight ``per`` episode, own turn
    or own token of it, in the order of the packed turns."""

    per: Per
    advantages_U: Tensor
    weights_U: Tensor


@dataclass(frozen=True, slots=True)
class Estimate:
    """What ``gae`` makes of an experience: the lesson of the agent, that of its critic, and how
    much of the discounted rewards the critic's values explained (None: all rewards are equal)."""

    lesson: Lesson
    targets: ValueTargets
    explained_variance: float | None


@dataclass(frozen=True, slots=True)
class OwnMoments:
    """Where an agent's own turns lie. ``first_H`` and ``count_H`` are a turn's own tokens,
    ``step_H`` its step (-1: it has no tokens and counts for nothing); ``episode_S`` a step's
    episode, ``left_S`` how many steps the episode has after it. ``before_S`` and ``during_S`` sum
    log(new/old) of what the others wrote before a step, and from it until the next one."""

    first_H: Tensor
    count_H: Tensor
    step_H: Tensor
    episode_S: Tensor
    left_S: Tensor
    before_S: Tensor
    during_S: Tensor


def own_moments(
    packed: PackedTurns,
    episodes: Sequence[Episode],
    agent: str,
    log_ratios: Sequence[Sequence[float]] | None = None,
) -> OwnMoments:
    """The steps of an experience's packed own turns. ``log_ratios`` has log(new/old) of every turn
    of every episode, 0 for agents that have not changed; None: nobody has."""
    count_H = torch.bincount(packed.turn_T, minlength=packed.turns)
    counts = iter(count_H.tolist())
    step_H: list[int] = []
    episode_S: list[int] = []
    left_S: list[int] = []
    before_S: list[float] = []
    during_S: list[float] = []
    for index, episode in enumerate(episodes):
        ratios = [0.0] * len(episode.turns) if log_ratios is None else log_ratios[index]
        mine = [(t.moment, next(counts)) for t in episode.turns if t.agent == agent]
        moments = sorted({moment for moment, tokens in mine if tokens})
        place = {moment: len(episode_S) + k for k, moment in enumerate(moments)}
        step_H += [place[moment] if tokens else -1 for moment, tokens in mine]
        pairs = zip(episode.turns, ratios, strict=True)
        others = [(turn.moment, u) for turn, u in pairs if turn.agent != agent]
        for begin, end in pairwise([*moments, math.inf]):
            before_S.append(sum(u for moment, u in others if moment < begin))
            during_S.append(sum(u for moment, u in others if begin <= moment < end))
        episode_S += [index] * len(moments)
        left_S += range(len(moments) - 1, -1, -1)
    return OwnMoments(
        first_H=count_H.cumsum(0) - count_H,
        count_H=count_H,
        step_H=torch.tensor(step_H, dtype=torch.long),
        episode_S=torch.tensor(episode_S, dtype=torch.long),
        left_S=torch.tensor(left_S, dtype=torch.long),
        before_S=torch.tensor(before_S, dtype=torch.float64),
        during_S=torch.tensor(during_S, dtype=torch.float64),
    )


def own_advantages(
    moments: OwnMoments,
    values_T: Tensor,
    rewards_E: Tensor,
    *,
    gamma: float,
    lam: float,
    per: Per,
) -> Tensor:
    """Advantages of each own turn [H] or token [T], as ``per`` says, in float64.

    ``values_T`` has V of the state before each own token; a turn's is that of its first one. A turn
    without tokens gets 0.
    """
    values_T, rewards_E = values_T.double(), rewards_E.double()
    advantages_T = torch.zeros_like(values_T)
    steps = len(moments.episode_S)
    spoke_H = moments.step_H >= 0
    turns_S = torch.bincount(moments.step_H[spoke_H], minlength=steps)
    trace_S = truncated_traces(moments.during_S)
    value_S, advantage_S = (torch.zeros(steps, dtype=torch.float64) for _ in range(2))
    left_H = torch.full_like(moments.step_H, -1)
    left_H[spoke_H] = moments.left_S[moments.step_H[spoke_H]]
    for left in range(int(left_H.max()) + 1 if len(left_H) else 0):
        turn_N = (left_H == left).nonzero().squeeze(-1)
        step_N, first_N = moments.step_H[turn_N], moments.first_H[turn_N]
        length_N = moments.count_H[turn_N] if per == "token" else torch.ones_like(turn_N)
        if left == 0:
            tail_N = rewards_E[moments.episode_S[step_N]]
        else:
            tail_N = gamma * (value_S[step_N + 1] + lam * advantage_S[step_N + 1])
        place_NK = first_N[:, None] + torch.arange(int(length_N.max()))
        real_NK = place_NK < (first_N + length_N)[:, None]
        values_NK = values_T[place_NK.clamp(max=len(values_T) - 1)]
        last_N1 = (length_N - 1)[:, None]
        end_N = values_NK.gather(1, last_N1).squeeze(1)
        # A reward that makes the last residual c (tail - V).
        paid_N = end_N + trace_S[step_N] * (tail_N - end_N)
        rewards_NK = torch.zeros_like(values_NK).scatter(1, last_N1, paid_N[:, None])
        ones_NK = torch.ones_like(values_NK)
        found_NK = gae(rewards_NK, values_NK, ones_NK, gamma=gamma, lam=lam, lengths=length_N)
        advantages_T[place_NK[real_NK]] = found_NK[real_NK]
        value_S += sum_by(values_T[first_N], step_N, steps) / turns_S
        advantage_S += sum_by(advantages_T[first_N], step_N, steps) / turns_S
    if per == "token":
        return advantages_T
    advantages_H = torch.zeros(len(spoke_H), dtype=torch.float64)
    advantages_H[spoke_H] = advantages_T[moments.first_H[spoke_H]]
    return advantages_H


def estimate(
    rule: GaeCredit,
    agent: str,
    episodes: Sequence[Episode],
    packed: PackedTurns,
    values_T: Tensor,
    critic: CriticSettings,
    log_weights_E: Tensor,
    log_ratios: Sequence[Sequence[float]] | None = None,
    cap: float | None = None,
) -> Estimate:
    """Advantages, weights and the critic's targets of an experience without what the world ended.

    ``values_T`` has V of the state before each own token. ``log_weights_E`` are log w of whole
    episodes, of which ``log_ratios`` has each turn's part; ``cap`` bounds w.
    """
    per = critic.boundary
    ratios = log_ratios if rule.traces else None
    moments = own_moments(packed, episodes, agent, ratios)
    rewards_E = torch.tensor([rule.worth(e, agent) for e in episodes], dtype=torch.float64)

    def advantages(lam: float) -> Tensor:
        return own_advantages(moments, values_T, rewards_E, gamma=critic.discount, lam=lam, per=per)

    log_weights_S = log_weights_E[moments.episode_S]
    if ratios is not None:
        whole_E = torch.tensor([sum(each) for each in ratios], dtype=torch.float64)
        log_weights_S = log_weights_S - whole_E[moments.episode_S] + moments.before_S
    weights_S, _ = capped_weights(log_weights_S, cap)
    spoke_H = moments.step_H >= 0
    weights_H = torch.zeros(len(spoke_H), dtype=torch.float64)
    weights_H[spoke_H] = weights_S[moments.step_H[spoke_H]]
    if per == "turn":
        weights_U, asked_U, tokens_N = weights_H, spoke_H, moments.first_H[spoke_H]
    else:
        weights_U, tokens_N = weights_H[packed.turn_T], torch.arange(packed.tokens)
        asked_U = torch.ones(packed.tokens, dtype=torch.bool)

    advantages_U = advantages(critic.lam)
    values_N, weights_N = values_T.double()[tokens_N], weights_U[asked_U]
    targets = ValueTargets(tokens_N, values_N + advantages_U[asked_U], values_N, weights_N)
    returns_N = values_N + advantages(1.0)[asked_U]
    explained = explained_variance(values_N, returns_N, weights_N)
    if rule.whiten:
        advantages_U = torch.where(asked_U, _whitened(advantages_U, weights_U), 0.0)
    if rule.clip is not None:
        advantages_U = advantages_U.clamp(-rule.clip, rule.clip)
    return Estimate(Lesson(per, advantages_U, weights_U), targets, explained)


def _whitened(advantages_U: Tensor, weights_U: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 under the weights; 0 where all that count are equal."""
    counted = advantages_U[weights_U != 0]
    if not len(counted) or bool((counted == counted[0]).all()):
        return torch.zeros_like(advantages_U)
    share_U = weights_U / weights_U.sum()
    centred_U = advantages_U - (share_U * advantages_U).sum()
    return centred_U / ((share_U * centred_U**2).sum().sqrt() + 1e-8)
