"""How penalties and actual errors grow with the team, the XOR team, and the rate of Theorem 4.8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from satune.lab import bounds
from satune.lab.ledger import Ledger
from satune.lab.mdp import (
    World,
    evaluate,
    gain_by_state,
    marginal_advantage,
    random_policy,
    random_world,
    tilted,
    total_variation,
    updated,
)

LARGEST_TEAM = 8
STEP_TV = 0.05
"""How far each agent of the growing teams moves, in the largest TV of a state."""


def growth(rng: torch.Generator, batch: int = 60) -> dict[str, Any]:
    """Penalties of fresh and stale stages and the errors that really occur, for n = 1..8 agents of
    two actions that all move by the same TV; exponents fitted to them in n.

    ``penalty``: every max|g| is 1, the comparison that theory makes; ``measured``: with the gains
    that the agents really have, which shrink as the team grows."""
    sizes = list(range(1, LARGEST_TEAM + 1))
    rows: dict[str, list[float]] = {
        name: []
        for name in (
            "penalty_fresh", "penalty_stale", "measured_fresh", "measured_stale",
            "actual_fresh", "actual_stale", "actual_naive",
        )
    }  # fmt: skip
    for agents in sizes:
        world = random_world(rng, batch, 3, agents, 2, "all at once")
        # One discount, so that the worlds can be averaged.
        world = World(**{**world.__dict__, "gamma": torch.full_like(world.gamma, 0.9)})
        old = 0.5 * random_policy(rng, world, 2) + 0.25
        for name, value in _stage(world, old).items():
            rows[name].append(float(value.mean()))
    exponents = {name: slope(sizes, values) for name, values in rows.items()}
    return {"agents": sizes, "series": rows, "exponents": exponents}


def slope(sizes: list[int], values: list[float]) -> float | None:
    """The exponent of a power law through the points from n = 2 on."""
    kept = [(n, v) for n, v in zip(sizes, values, strict=True) if n >= 2 and v > 0]
    if len(kept) < 3:
        return None
    x, y = np.log([n for n, _ in kept]), np.log([v for _, v in kept])
    return float(np.polyfit(x, y, 1)[0])


def _stage(world: World, old: Tensor) -> dict[str, Tensor]:
    """Every agent once, towards its own advantage by the same TV."""
    first = evaluate(world, old)
    gamma, current, now = world.gamma, old, first
    fresh = stale = naive = torch.zeros_like(gamma)
    largest_g, tvs = [], []
    for agent in range(old.shape[1]):
        target = tilted(world, current, agent, now, torch.full_like(gamma, 50.0))
        distance = total_variation(current[:, agent], target).amax(-1)
        share = (STEP_TV / distance.clamp(min=1e-12)).clamp(max=1.0)[:, None, None]
        new = updated(current, agent, (1 - share) * current[:, agent] + share * target)
        gain_S = gain_by_state(world, new, now)
        fresh = fresh + (now.occupancy * gain_S).sum(-1) / (1 - gamma)
        stale = stale + (first.occupancy * gain_S).sum(-1) / (1 - gamma)
        alone = gain_by_state(world, updated(old, agent, new[:, agent]), first)
        naive = naive + (first.occupancy * alone).sum(-1) / (1 - gamma)
        largest_g.append(gain_S.abs().amax(-1))
        tvs.append(total_variation(current[:, agent], new[:, agent]).amax(-1))
        current, now = new, evaluate(world, new)
    change = now.returns - first.returns
    g_N, tv_N = torch.stack(largest_g, -1), torch.stack(tvs, -1)
    one_N = torch.ones_like(g_N)
    return {
        "penalty_fresh": bounds.penalty_fresh(gamma, one_N, tv_N),
        "penalty_stale": bounds.penalty_stale(gamma, one_N, tv_N),
        "measured_fresh": bounds.penalty_fresh(gamma, g_N, tv_N),
        "measured_stale": bounds.penalty_stale(gamma, g_N, tv_N),
        "actual_fresh": (change - fresh).abs(),
        "actual_stale": (change - stale).abs(),
        "actual_naive": (change - naive).abs(),
    }


def xor_team(delta: float = 0.05, points: int = 99) -> dict[str, Any]:
    """Two agents, reward 1 if their bits differ; both start with the same chance p of a 1 and take
    the best step inside KL(old‖new) <= delta, one after the other or both from the same team."""
    starts = np.linspace(0.01, 0.99, points)
    change: dict[str, list[float]] = {"fresh": [], "stale": []}

    def reward(p: float, q: float) -> float:
        return p * (1 - q) + q * (1 - p)

    def best(own: float, other: float) -> float:
        """The end of the trust region that the other's policy makes worth going to."""
        if other == 0.5:
            return own
        up = 1 - 2 * other > 0
        low, high = (own, 1.0) if up else (0.0, own)
        for _ in range(60):
            middle = (low + high) / 2
            inside = bernoulli_kl(own, middle) <= delta
            if up == inside:
                low = middle
            else:
                high = middle
        return low if up else high

    for p in starts:
        before = reward(p, p)
        first = best(p, p)
        change["fresh"].append(float(reward(first, best(p, first)) - before))
        change["stale"].append(float(reward(first, best(p, p)) - before))
    worst = int(np.argmin(change["stale"]))
    return {
        "delta": delta,
        "starts": starts.tolist(),
        **change,
        "worst_stale_start": float(starts[worst]),
        "worst_stale": change["stale"][worst],
        "fresh_there": change["fresh"][worst],
        "stale_decreases": float(np.mean(np.array(change["stale"]) < -1e-12)),
        "fresh_decreases": float(np.mean(np.array(change["fresh"]) < -1e-12)),
    }


def bernoulli_kl(p: float, q: float) -> float:
    """KL(p‖q) of two coins."""
    if not 0 < q < 1:
        return 0.0 if p == q else float("inf")
    terms = [a * np.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0]
    return float(sum(terms))


def softmax_rate(
    ledger: Ledger, rng: torch.Generator, instances: int, steps: int = 64
) -> dict[str, Any]:
    """Theorem 4.8 on softmax tables: gradient steps of 1/L on sum_s d(s) E_{a~softmax} A(s, a) with
    occupancy and advantage held fixed ascend, and min_k |G_k|^2 <= 2L (G* - G_0)/K."""
    ledger.where = "softmax tables"
    world = random_world(rng, instances, 3, 2, 3, "all at once")
    old = 0.9 * random_policy(rng, world, 3) + 0.1 / 3
    values = evaluate(world, old)
    own = marginal_advantage(world, old, 0, values)
    weight = (values.occupancy / (1 - world.gamma)[:, None])[..., None]
    # |grad log pi| <= sqrt 2 for a softmax over logits, |Hessian| <= 1/2; the sums over states are
    # weighted by an occupancy, which has mass 1.
    smooth = bounds.smoothness(world.gamma, values.a_max, 2**0.5, 0.5)
    logits = old[:, 0].log()
    best = (weight * own.amax(-1, keepdim=True)).sum((1, 2))

    def objective(logits: Tensor) -> Tensor:
        return (weight * torch.softmax(logits, -1) * own).sum((1, 2))

    start = objective(logits)
    smallest, value = torch.full_like(start, torch.inf), start
    curve = []
    for step in range(1, steps + 1):
        p = torch.softmax(logits, -1)
        gradient = weight * p * (own - (p * own).sum(-1, keepdim=True))
        smallest = torch.minimum(smallest, gradient.square().sum((1, 2)))
        logits = logits + gradient / smooth[:, None, None]
        following = objective(logits)
        ledger.certificate("ascent", following - value, torch.zeros_like(value),
                           torch.zeros_like(value), 1e-12, one_sided=True)  # fmt: skip
        value = following
        limit = bounds.rate(smooth, best - start, step)
        ledger.limit("rate", smallest, limit, 1e-12)
        curve.append([step, float(smallest.median()), float(limit.median())])
    return {"curve": curve}
