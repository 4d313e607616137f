"""What a step can be expected to gain, for orders that ask (THEORY §6 "Order")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.ports import Learner
from satune.types import Key

DAMPING = 1e-3
"""Added to the diagonal Fisher relative to its mean, where too few episodes leave zeros."""


def predicted_gain(
    learner: Learner, packed: PackedTurns, advantages_T: Tensor, delta: float, key: Key
) -> float:
    """√(2δ max(0, ĝ₁ᵀF⁻¹ĝ₂)): what a natural-gradient step inside δ can gain (Theorem 4.7).

    ``advantages_T`` has the advantage of each own token. ĝ₁ and ĝ₂ are policy gradients of two
    halves of the episodes, so that noise does not square into gain; F is the diagonal Fisher,
    estimated by one backward with random signs an episode, whose square has the sum of squared
    scores as its mean. A prediction, never evidence.
    """
    if packed.tokens == 0:
        return 0.0
    count = packed.episodes
    order = list(range(count))
    key.rng("greedy halves").shuffle(order)
    half_E = torch.zeros(count, dtype=torch.bool)
    half_E[order[: count // 2]] = True
    signs = key.rng("greedy signs")
    sign_E = torch.tensor([signs.choice((-1.0, 1.0)) for _ in range(count)], dtype=torch.float64)

    half_T = half_E[packed.episode_T]
    advantages_T = advantages_T.double()

    def pulled(coefficient_T: Tensor) -> dict[str, Tensor]:
        return learner.gradient(packed, coefficient_T)

    first = pulled(torch.where(half_T, advantages_T, 0.0) / max(int(half_E.sum()), 1))
    second = pulled(torch.where(half_T, 0.0, advantages_T) / max(int((~half_E).sum()), 1))
    score = pulled(sign_E[packed.episode_T])
    mean_fisher = sum(float(s.double().square().sum()) for s in score.values()) / (
        count * sum(s.numel() for s in score.values())
    )
    if mean_fisher == 0.0:
        return 0.0
    product = sum(
        float(
            (
                first[name].double()
                * second[name].double()
                / (score[name].double().square() / count + DAMPING * mean_fisher)
            ).sum()
        )
        for name in score
    )
    return math.sqrt(2 * delta * max(0.0, product))
