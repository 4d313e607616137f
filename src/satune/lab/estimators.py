"""Multi-step advantages with truncated traces on enumerated conversations (THEORY §6).

Some agents have changed since the conversations were written, agent 0 has not: its advantages under
the new team are estimated from what the old team wrote, with exact values of the new team. Traces
do that with a bias, which is computed by summing over every leaf and held against its bound.
Shape suffixes: ``B`` instances, ``L`` leaves, ``K`` steps, ``C`` what is known when a step is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from satune.core.advantages import gae, truncated_traces
from satune.lab.conversations import ACTIONS, ROUNDING, Layout, Tree, _moved
from satune.lab.ledger import Ledger
from satune.lab.mdp import _simplex

OWN = 0
"""The agent whose advantages are estimated."""
LAYOUTS = (
    Layout("two turns, answers between and after", ((0,), (1,), (0,), (1,)), (1,)),
    Layout("two turns, two agents answer", ((0,), (1,), (2,), (0,), (2,)), (1, 2)),
    Layout("two turns, one at once with another", ((1,), (0, 1), (2,), (0,)), (1,)),
    Layout("three turns", ((0,), (1,), (0,), (2,), (0,)), (1, 2)),
)
DISCOUNTS = 5
"""Pairs of a discount and a λ a layout."""


def check_estimators(ledger: Ledger, rng: torch.Generator, instances: int, seed: int) -> int:
    """Check about ``instances`` conversations, equally many of each layout; how many it were."""
    batch = -(-instances // (len(LAYOUTS) * DISCOUNTS))
    for layout in LAYOUTS:
        for _ in range(DISCOUNTS):
            gamma, lam = 1 - 0.5 * torch.rand(2, generator=rng, dtype=torch.float64) ** 2
            ledger.where = f"seed {seed}, estimates in {layout.name}"
            leaves = ACTIONS ** len(layout.slots)
            reward = torch.rand(batch, leaves, generator=rng, dtype=torch.float64)
            tree = Tree.of(layout, reward)
            old = [_simplex(rng, (batch, size, ACTIONS)) for size in tree.histories]
            share = 10 ** (-3 * torch.rand(batch, 1, 1, generator=rng, dtype=torch.float64))
            new = [
                _moved(rng, table, share) if agent in layout.changed else table
                for table, (_, agent) in zip(old, layout.slots, strict=True)
            ]
            check = (ledger, tree, old, new, float(gamma), float(lam))
            check_own_steps(*check)
            check_moments(*check)
    return batch * len(LAYOUTS) * DISCOUNTS


def check_own_steps(
    ledger: Ledger, tree: Tree, old: Sequence[Tensor], new: Sequence[Tensor], gamma: float,
    lam: float,
) -> None:  # fmt: skip
    """A_k = c_k (r_k + γ V_{k+1} - V_k + γλ A_{k+1}) over own turns, c_k of what others answer:
    its bias is at most α D/(1 - γλ(1-α)), α the largest TV of an answer, D the largest residual."""
    slots = tree.layout.slots
    own = [i for i, (_, agent) in enumerate(slots) if agent == OWN]
    begins = [slots[i][0] for i in own]
    ends = [*begins[1:], len(tree.layout.speakers)]
    values, traces, alpha = [], [], torch.zeros(len(tree.reward), dtype=torch.float64)
    for slot, begin, end in zip(own, begins, ends, strict=True):
        known = tree.history[slot] * ACTIONS + tree.action[slot]
        values.append(_value(tree, new, slot, gamma ** (len(own) - 1 - begins.index(begin))))
        answers = [i for i, (m, agent) in enumerate(slots) if begin <= m < end and agent != OWN]
        before, after = tree.leaf(old, answers), tree.leaf(new, answers)
        traces.append(_trace(before, after))
        later = tree.leaf(old, [i for i, (m, _) in enumerate(slots) if m >= end])
        variation = _summed((before - after).abs() * later, known) / 2
        alpha = torch.maximum(alpha, variation.amax(-1))
    found, residual = _estimate(tree, values, traces, gamma, lam)
    found = torch.stack(traces, -1) * found
    bound = alpha * residual.abs().amax((1, 2)) / (1 - gamma * lam * (1 - alpha))
    for k, (slot, begin) in enumerate(zip(own, begins, strict=True)):
        known = tree.history[slot] * ACTIONS + tree.action[slot]
        others = [i for i, (m, _) in enumerate(slots) if m >= begin and i != slot]
        estimate = _summed(tree.leaf(old, others) * found[..., k], known)
        paid = tree.reward * gamma ** (len(own) - 1 - k)
        exact = _summed(tree.leaf(new, others) * (paid - values[k]), known)
        ledger.limit("traces_own_steps", (estimate - exact).abs().amax(-1), bound, ROUNDING)


def check_moments(
    ledger: Ledger, tree: Tree, old: Sequence[Tensor], new: Sequence[Tensor], gamma: float,
    lam: float,
) -> None:  # fmt: skip
    """A_t = δ_t + Σ (γλ)^l c_{t+1} ... c_{t+l} δ_{t+l} over every moment of the team, as the paper
    has it: its bias is at most γλ α A_max/(1 - γλ(1-α))."""
    slots, last = tree.layout.slots, len(tree.layout.speakers) - 1
    values, traces = [], []
    alpha, known = torch.zeros(len(tree.reward), dtype=torch.float64), []
    for moment in range(last + 1):
        now = [i for i, (m, _) in enumerate(slots) if m == moment]
        values.append(_value(tree, new, now[0], gamma ** (last - moment)))
        before, after = tree.leaf(old, now), tree.leaf(new, now)
        traces.append(_trace(before, after))
        later = tree.leaf(old, [i for i, (m, _) in enumerate(slots) if m > moment])
        variation = _summed((before - after).abs() * later, tree.history[now[0]]) / 2
        alpha = torch.maximum(alpha, variation.amax(-1))
        after_now = next((i for i, (m, _) in enumerate(slots) if m > moment), None)
        leaves = torch.arange(tree.reward.shape[1])
        known.append(leaves if after_now is None else tree.history[after_now])
    found, residual = _estimate(tree, values, traces, gamma, lam)
    largest = residual.abs().amax((1, 2))  # of exact values it is the advantage
    bound = gamma * lam * alpha * largest / (1 - gamma * lam * (1 - alpha))
    for moment in range(last + 1):
        others = tree.leaf(old, [i for i, (m, _) in enumerate(slots) if m > moment])
        estimate = _summed(others * found[..., moment], known[moment])
        exact = _summed(others * residual[..., moment], known[moment])
        ledger.limit("traces_moments", (estimate - exact).abs().amax(-1), bound, ROUNDING)


def _value(tree: Tree, tables: Sequence[Tensor], slot: int, discount: float) -> Tensor:
    """The discounted reward to come before a message, at every leaf [B, L]."""
    moment = tree.layout.slots[slot][0]
    rest = [i for i, (m, _) in enumerate(tree.layout.slots) if m >= moment]
    value = _summed(tree.leaf(tables, rest) * tree.reward * discount, tree.history[slot])
    return value[:, tree.history[slot]]


def _estimate(
    tree: Tree, values: list[Tensor], traces: list[Tensor], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimates and residuals of every step at every leaf, both [B, L, K]."""
    values_BLK, traces_BLK = torch.stack(values, -1), torch.stack(traces, -1)
    rewards_BLK = torch.zeros_like(values_BLK)
    rewards_BLK[..., -1] = tree.reward
    rows = (rewards_BLK.flatten(0, 1), values_BLK.flatten(0, 1), traces_BLK.flatten(0, 1))
    found = gae(*rows, gamma=gamma, lam=lam).view_as(values_BLK)
    residual = gae(*rows, gamma=gamma, lam=0.0).view_as(values_BLK)
    return found, residual


def _trace(before: Tensor, after: Tensor) -> Tensor:
    """c [B, L] of the ratio of two probabilities, 1 where the old one is 0."""
    ratio = torch.where(before > 0, after / before.clamp(min=1e-300), 1.0)
    return truncated_traces(ratio.log())


def _summed(values: Tensor, known: Tensor) -> Tensor:
    """Sums [B, C] over the leaves that share what is known."""
    return values.new_zeros(len(values), int(known.max()) + 1).index_add(1, known, values)
