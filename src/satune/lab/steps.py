"""Every bound of THEORY §2 and §3 against exact values of random team MDPs."""

from __future__ import annotations

import torch
from torch import Tensor

from satune.core import variation
from satune.lab import bounds
from satune.lab.ledger import Ledger
from satune.lab.mdp import (
    MASKS,
    Values,
    World,
    divergence,
    evaluate,
    gain_by_state,
    joint_policy,
    random_policy,
    random_world,
    tilted,
    total_variation,
    updated,
)
from satune.lab.traps import trap_world

SHAPES = ((3, 2, 2), (4, 2, 3), (3, 3, 2))
"""(states, agents, actions) of the instances."""
TRAPS = ((1, False), (2, False), (2, True))
"""(agents, whether they are paid for the product of their signs) of the tight worlds."""


def check_steps(ledger: Ledger, rng: torch.Generator, instances: int, seed: int) -> int:
    """Check about ``instances`` instances, as many of each mask and shape; how many it were."""
    done = 0
    batch = -(-instances // (len(MASKS) * len(SHAPES) + len(TRAPS)))
    for mask in MASKS:
        for states, agents, actions in SHAPES:
            ledger.where = f"seed {seed}, {mask}, {states} states, {agents} agents"
            world = random_world(rng, batch, states, agents, actions, mask)
            old = random_policy(rng, world, actions)
            agent = int(torch.randint(agents, (1,), generator=rng))
            towards = proposal(rng, world, old, agent, evaluate(world, old))
            _check_step(ledger, rng, world, old, updated(old, agent, towards), agent)
            _check_line_search(ledger, world, old)
            _check_stage(ledger, rng, world, old)
            done += batch
    for agents, signs in TRAPS:
        ledger.where = f"seed {seed}, trap of {agents} agents{', signs' if signs else ''}"
        world, old, new = trap_world(rng, batch, agents, signs=signs)
        _check_step(ledger, rng, world, old, updated(old, 0, new[:, 0]), 0)
        _check_line_search(ledger, world, old)
        _check_stage(ledger, rng, world, old, new)
        done += batch
    return done


def rounding(world: World) -> Tensor:
    """What float64 may make of a return: some hundred roundings of up to 1/(1-gamma)^2."""
    return 256 * torch.finfo(torch.float64).eps / (1 - world.gamma) ** 2


def proposal(rng: torch.Generator, world: World, old: Tensor, agent: int, values: Values) -> Tensor:
    """One agent's new policy [B, S, A]: half of them learn, half wander; steps of every size."""
    size = 10 ** (-4 + 5 * torch.rand(len(old), generator=rng, dtype=torch.float64))
    learnt = tilted(world, old, agent, values, size)
    other = random_policy(rng, world, old.shape[-1])[:, agent]
    share = size.clamp(max=1.0)[:, None, None]
    wandered = (1 - share) * old[:, agent] + share * other
    coin = torch.rand(len(old), 1, 1, generator=rng) < 0.5
    return torch.where(coin, learnt, wandered)


def _check_step(
    ledger: Ledger, rng: torch.Generator, world: World, old: Tensor, new: Tensor, agent: int
) -> None:
    values, slack = evaluate(world, old), rounding(world)
    after = evaluate(world, new)
    change = after.returns - values.returns
    gamma = world.gamma

    tv_S = total_variation(old[:, agent], new[:, agent])
    kl_S = divergence(old[:, agent], new[:, agent])
    back_S = divergence(new[:, agent], old[:, agent])
    mean_tv = (values.occupancy * tv_S).sum(-1).clamp(max=1.0)
    sup_tv, sup_kl = tv_S.amax(-1), kl_S.amax(-1)

    gain_S = gain_by_state(world, new, values)
    gain = (values.occupancy * gain_S).sum(-1) / (1 - gamma)
    penalties = bounds.step_penalties(
        gamma,
        a_max=values.a_max,
        span=values.span,
        sup_kl=sup_kl,
        sup_tv=sup_tv,
        mean_tv=mean_tv,
        max_gain=gain_S.abs().amax(-1),
    )
    for name, penalty in penalties.items():
        positive = ledger.certificate(name, change, gain, penalty, slack)
        if name == "paper":
            ledger.count(name, "positive_gamma_half", int((positive & (gamma >= 0.5)).sum()))

    ledger.limit("pinsker", tv_S.flatten(), variation.tv_pinsker(kl_S).flatten(), 1e-12)
    huber_S = variation.tv_bretagnolle_huber(back_S)
    ledger.limit("bretagnolle_huber", tv_S.flatten(), huber_S.flatten(), 1e-12)
    moved = (after.occupancy - values.occupancy).abs().sum(-1)
    ledger.limit("occupancy_mean", moved, bounds.occupancy_shift_mean(gamma, mean_tv), slack)
    ledger.limit("occupancy_sup", moved, bounds.occupancy_shift_sup(gamma, sup_tv), slack)
    ledger.limit("return_change", change, bounds.return_change(gamma, values.span, sup_tv), slack)

    # An advantage that is wrong by at most ``bias`` misjudges the surrogate by what it costs.
    bias = 10 ** (-3 * torch.rand(len(old), generator=rng, dtype=torch.float64))
    noise = 2 * torch.rand(world.reward.shape, generator=rng, dtype=torch.float64) - 1
    wrong = noise * bias[:, None, None]
    weights = values.occupancy[..., None] / (1 - gamma)[:, None, None]
    after_J, before_J = joint_policy(world, new), joint_policy(world, old)
    misjudged = (weights * after_J * wrong).sum((1, 2))
    centred = (weights * (after_J - before_J) * wrong).sum((1, 2))
    ledger.limit("bias", misjudged, bounds.bias_cost(gamma, bias), slack)
    ledger.limit("bias_centred", centred, bounds.bias_cost_centred(gamma, bias, sup_tv), slack)

    # The mean TV from how often KL exceeds some delta.
    delta = 10 ** (-3 * torch.rand(len(old), generator=rng, dtype=torch.float64))
    rate = (values.occupancy * (kl_S > delta[:, None])).sum(-1).clamp(max=1.0)
    ledger.limit("violation_rate", mean_tv, bounds.mean_tv_from_violations(delta, rate), 1e-12)


def _check_line_search(ledger: Ledger, world: World, old: Tensor) -> None:
    """Steps chosen for the largest L - C along a path that learns: how many are certified."""
    agent, values = 0, evaluate(world, old)
    best = torch.full_like(world.gamma, -torch.inf)
    kept = [torch.zeros_like(best) for _ in range(3)]
    for exponent in torch.linspace(-4, 3, 29, dtype=torch.float64):
        size = torch.full_like(world.gamma, float(10**exponent)) * (1 - world.gamma)
        new = updated(old, agent, tilted(world, old, agent, values, size))
        tv_S = total_variation(old[:, agent], new[:, agent])
        gain_S = gain_by_state(world, new, values)
        gain = (values.occupancy * gain_S).sum(-1) / (1 - world.gamma)
        penalty = bounds.least_penalty(
            bounds.step_penalties(
                world.gamma,
                a_max=values.a_max,
                span=values.span,
                sup_kl=divergence(old[:, agent], new[:, agent]).amax(-1),
                sup_tv=tv_S.amax(-1),
                mean_tv=(values.occupancy * tv_S).sum(-1).clamp(max=1.0),
                max_gain=gain_S.abs().amax(-1),
            )
        )
        better = gain - penalty > best
        best = torch.where(better, gain - penalty, best)
        change = evaluate(world, new).returns - values.returns
        for index, value in enumerate((change, gain, penalty)):
            kept[index] = torch.where(better, value, kept[index])
    change, gain, penalty = kept
    ledger.certificate("line_search", change, gain, penalty, rounding(world))


def _check_stage(
    ledger: Ledger, rng: torch.Generator, world: World, old: Tensor, target: Tensor | None = None
) -> None:
    """A sweep over all agents in a random order: fresh, with stale states, and naive. Each moves to
    its ``target`` [B, N, S, A], or by a proposal of its own."""
    agents = old.shape[1]
    order = torch.randperm(agents, generator=rng).tolist()
    first, slack = evaluate(world, old), agents * rounding(world)
    gamma, current, now = world.gamma, old, evaluate(world, old)
    gains, stale_gains, naive_gains, largest, largest_g, tvs, kls = ([] for _ in range(7))
    shifts: list[Tensor] = []
    for agent in order:
        towards = proposal(rng, world, current, agent, now) if target is None else target[:, agent]
        new = updated(current, agent, towards)
        tv_S = total_variation(current[:, agent], new[:, agent])
        gain_S = gain_by_state(world, new, now)
        mean_tv = (now.occupancy * tv_S).sum(-1).clamp(max=1.0)
        penalty = bounds.least_penalty(
            bounds.step_penalties(
                gamma,
                a_max=now.a_max,
                span=now.span,
                sup_kl=divergence(current[:, agent], new[:, agent]).amax(-1),
                sup_tv=tv_S.amax(-1),
                mean_tv=mean_tv,
                max_gain=gain_S.abs().amax(-1),
            )
        )
        gains.append((now.occupancy * gain_S).sum(-1) / (1 - gamma))
        stale_gains.append((first.occupancy * gain_S).sum(-1) / (1 - gamma))
        # Naive: the agent's own change judged by the advantage of the team before the stage.
        alone = gain_by_state(world, updated(old, agent, new[:, agent]), first)
        naive_gains.append((first.occupancy * alone).sum(-1) / (1 - gamma))
        largest.append(penalty)
        largest_g.append(gain_S.abs().amax(-1))
        tvs.append(tv_S.amax(-1))
        kls.append(divergence(current[:, agent], new[:, agent]).amax(-1))
        shifts.append((now.occupancy - first.occupancy).abs().sum(-1))
        current, now = new, evaluate(world, new)
    change = now.returns - first.returns
    tv_N, kl_N, g_N = torch.stack(tvs, -1), torch.stack(kls, -1), torch.stack(largest_g, -1)
    total = torch.stack(gains, -1).sum(-1)
    ledger.certificate("stage", change, total, torch.stack(largest, -1).sum(-1), slack)
    ledger.certificate("stage_fresh", change, total, bounds.penalty_fresh(gamma, g_N, tv_N), slack)
    ledger.certificate(
        "stage_stale", change, torch.stack(stale_gains, -1).sum(-1),
        bounds.penalty_stale(gamma, g_N, tv_N), slack,
    )  # fmt: skip
    ledger.certificate(
        "stage_naive", change, torch.stack(naive_gains, -1).sum(-1),
        bounds.penalty_naive(gamma, first.a_max, kl_N, tv_N), slack,
    )  # fmt: skip
    moved = torch.stack(shifts, -1)
    limit = bounds.stale_occupancy_shift(gamma, kl_N)
    ledger.limit("stale_occupancy", moved.flatten(), limit.flatten(), float(slack.max()))
    joint = total_variation(joint_policy(world, old), joint_policy(world, current)).amax(-1)
    ledger.limit("joint_tv", joint, variation.joint_tv(tv_N), 1e-12)
    # KL adds over the factors of a product, state by state (Lemma 4.3).
    whole = divergence(joint_policy(world, old), joint_policy(world, current))
    parts = divergence(old, current).sum(1)
    both = torch.isfinite(parts)
    difference = torch.where(both, whole - parts, 0.0).abs().amax(-1)
    size = torch.where(both, parts, 0.0).amax(-1)
    ledger.limit("kl_adds", difference, torch.zeros_like(gamma), 1e-12 * (1 + size))
