"""In which order a stage sweeps over the agents (THEORY §6 "Order").

An order is a callable ``order(sweep: Sweep) -> list of agents``, first to last: any of
``sweep.agents``, each at most once and at least one. Beyond ``sweep`` its parameters are its
options. A recipe names one of ORDERS or the user's own, ``order: path/to/file.py:name``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from satune.agents.packing import PackedTurns
from satune.agents.ports import Learner
from satune.loading import load_named
from satune.types import Episode, Key

DAMPING = 1e-3
"""Added to the diagonal Fisher relative to its mean, where too few episodes leave zeros."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What an order may look at before a stage begins.

    ``stage`` counts from 1. ``agents`` are those that learn, as the team lists them. ``last`` is
    the order of the stage before (empty before the first), ``accepted`` tells for each agent in it
    whether the team took its step. ``episodes`` are the stage's first rollout, ``rng`` is the
    stage's own. ``gains()`` predicts the gain of each agent's step, at the cost of three backward
    passes an agent; what it predicted is noted in the stage's event.
    """

    stage: int
    agents: tuple[str, ...]
    last: tuple[str, ...]
    accepted: Mapping[str, bool]
    episodes: Sequence[Episode]
    rng: random.Random
    gains: Callable[[], Mapping[str, float]]


Order = Callable[[Sweep], Sequence[str]]


def static(sweep: Sweep) -> list[str]:
    """As the team lists them."""
    return list(sweep.agents)


def shuffled(sweep: Sweep) -> list[str]:
    """Drawn anew each stage."""
    names = list(sweep.agents)
    sweep.rng.shuffle(names)
    return names


def greedy(sweep: Sweep) -> list[str]:
    """By the predicted gain of a step, the largest first."""
    gains = sweep.gains()
    return sorted(sweep.agents, key=lambda name: -gains[name])


ORDERS: dict[str, Callable[..., Any]] = {"static": static, "random": shuffled, "greedy": greedy}


def load_order(
    name: str, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> Order:
    """The order of that name, or the user's own, with its options filled in. Raises UserError."""
    return load_named("order", name, ORDERS, options or {}, skip=1, base=base)


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
