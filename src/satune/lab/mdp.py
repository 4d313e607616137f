"""Finite team MDPs in batches, with exact occupancies, values and advantages (THEORY §1).

Shape suffixes: ``B`` instances, ``S`` states, ``N`` agents, ``A`` actions of one agent, ``J`` joint
actions (A^N). An agent that is not active in a state plays action 0 there, whatever its policy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mask = Literal["all at once", "in turn", "random"]
MASKS: tuple[Mask, ...] = ("all at once", "in turn", "random")


@dataclass(frozen=True)
class World:
    """Transitions [B, S, J, S], rewards in [0, 1] [B, S, J], starts [B, S], discounts [B], who is
    active [B, S, N], which joint actions can be taken [B, S, J], and each one's parts [J, N]."""

    transition: Tensor
    reward: Tensor
    start: Tensor
    gamma: Tensor
    active: Tensor
    possible: Tensor
    parts: Tensor


@dataclass(frozen=True)
class Values:
    """Exact quantities of one team policy: J [B], occupancy [B, S], advantages [B, S, J]."""

    returns: Tensor
    occupancy: Tensor
    advantage: Tensor

    @property
    def a_max(self) -> Tensor:
        return self.advantage.nan_to_num(0.0).abs().amax((1, 2))

    @property
    def span(self) -> Tensor:
        """Sp [B], the largest spread of the advantages of one state."""
        possible = ~self.advantage.isnan()
        high = self.advantage.masked_fill(~possible, -torch.inf).amax(2)
        low = self.advantage.masked_fill(~possible, torch.inf).amin(2)
        return (high - low).amax(1)


def random_world(
    rng: torch.Generator, batch: int, states: int, agents: int, actions: int, mask: Mask
) -> World:
    """Random instances: sparse and dense transitions, rewards, starts; gamma from 0 to .99."""
    joint = actions**agents
    parts = torch.tensor(list(itertools.product(range(actions), repeat=agents)))
    transition = _simplex(rng, (batch, states, joint, states))
    # A quarter of the worlds are deterministic, and in half of those a state is left for good.
    target = torch.randint(states, (batch, states, joint), generator=rng)
    certain = torch.nn.functional.one_hot(target, states).double()
    sink = torch.rand(batch, generator=rng) < 0.5
    certain[:, -1] = torch.where(
        sink[:, None, None], torch.eye(states, dtype=torch.float64)[-1], certain[:, -1]
    )
    deterministic = torch.rand(batch, 1, 1, 1, generator=rng) < 0.25
    transition = torch.where(deterministic, certain, transition)
    reward = torch.rand(batch, states, joint, generator=rng, dtype=torch.float64)
    # A third of the worlds have rewards of 0 and 1 only.
    coarse = torch.rand(batch, 1, 1, generator=rng) < 1 / 3
    reward = torch.where(coarse, reward.round(), reward)
    gamma = 1 - 10 ** (-2 * torch.rand(batch, generator=rng, dtype=torch.float64))
    active = active_agents(rng, batch, states, agents, mask)
    rests = parts == 0
    possible = (active[:, :, None, :] | rests).all(-1)
    return World(transition, reward, _simplex(rng, (batch, states)), gamma, active, possible, parts)


def active_agents(rng: torch.Generator, batch: int, states: int, agents: int, mask: Mask) -> Tensor:
    """Who acts where [B, S, N]; somebody does in every state."""
    if mask == "all at once":
        return torch.ones(batch, states, agents, dtype=torch.bool)
    turns = torch.arange(states)[:, None] % agents == torch.arange(agents)
    if mask == "in turn":
        return turns.expand(batch, -1, -1).clone()
    return (torch.rand(batch, states, agents, generator=rng) < 0.5) | turns


def random_policy(rng: torch.Generator, world: World, actions: int) -> Tensor:
    """Policies [B, N, S, A], from flat to nearly deterministic, some with actions of probability 0;
    inactive agents play action 0."""
    batch, states, agents = world.active.shape
    return rest_where_inactive(world, _simplex(rng, (batch, agents, states, actions)))


def rest_where_inactive(world: World, policy: Tensor) -> Tensor:
    rest = torch.zeros_like(policy)
    rest[..., 0] = 1.0
    return torch.where(world.active.transpose(1, 2)[..., None], policy, rest)


def joint_policy(world: World, policy: Tensor) -> Tensor:
    """The product over the agents [B, S, J]."""
    agents = policy.shape[1]
    chosen = [policy[:, i][:, :, world.parts[:, i]] for i in range(agents)]
    return torch.stack(chosen).prod(0)


def evaluate(world: World, policy: Tensor) -> Values:
    """J, occupancy and advantage of a team policy by linear solves. Advantages of joint actions
    that cannot be taken are NaN."""
    joint = joint_policy(world, policy)
    moves = torch.einsum("bsj,bsjt->bst", joint, world.transition)
    gains = (joint * world.reward).sum(-1)
    gamma = world.gamma[:, None, None]
    system = torch.eye(moves.shape[-1], dtype=torch.float64) - gamma * moves
    value = torch.linalg.solve(system, gains.unsqueeze(-1)).squeeze(-1)
    visits = torch.linalg.solve(system.transpose(1, 2), world.start.unsqueeze(-1)).squeeze(-1)
    after = torch.einsum("bsjt,bt->bsj", world.transition, value)
    advantage = world.reward + gamma * after - value[..., None]
    advantage = advantage.masked_fill(~world.possible, torch.nan)
    occupancy = (1 - world.gamma)[:, None] * visits
    return Values((world.start * value).sum(-1), occupancy, advantage)


def gain_by_state(world: World, new: Tensor, values: Values) -> Tensor:
    """g(s) = E_{a ~ new} A(s, a) [B, S], A the advantage of the old team."""
    return (joint_policy(world, new) * values.advantage.nan_to_num(0.0)).sum(-1)


def total_variation(old: Tensor, new: Tensor) -> Tensor:
    """TV over the last dimension."""
    return 0.5 * (old - new).abs().sum(-1).clamp(max=2.0)


def divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL(old‖new) over the last dimension, without cancellation; inf where new lacks support.

    Each term is old (r - 1 - log r) with r = new/old, plus new's mass where old has none.
    """
    support = old > 0
    ratio = torch.where(support, new / old.where(support, torch.ones_like(old)), 1.0)
    excess = ratio - 1
    # Far from 1 the ratio itself has the digits, near 1 its distance from it.
    log = torch.where(excess.abs() < 0.5, torch.log1p(excess.clamp(-0.5, 0.5)), ratio.log())
    terms = torch.where(ratio > 0, excess - log, torch.inf)
    elsewhere = torch.where(support, 0.0, new).sum(-1)
    return torch.where(support, old * terms, 0.0).sum(-1) + elsewhere


def updated(old: Tensor, agent: int, towards: Tensor) -> Tensor:
    """The team policy with one agent replaced by ``towards`` [B, S, A]."""
    new = old.clone()
    new[:, agent] = towards
    return new


def tilted(world: World, policy: Tensor, agent: int, values: Values, size: Tensor) -> Tensor:
    """The agent's policy times exp(size · its own advantage) [B, S, A]: a step that learns."""
    own = marginal_advantage(world, policy, agent, values)
    logits = policy[:, agent].log() + size[:, None, None] * own
    new = torch.softmax(logits, -1)
    return torch.where(world.active[:, :, agent, None], new, policy[:, agent])


def marginal_advantage(world: World, policy: Tensor, agent: int, values: Values) -> Tensor:
    """E over the others of A, by the agent's own action [B, S, A]."""
    others = policy.clone()
    others[:, agent] = 1.0
    weighted = joint_policy(world, others) * values.advantage.nan_to_num(0.0)
    actions = policy.shape[-1]
    own = world.parts[:, agent]
    return torch.stack([weighted[..., own == a].sum(-1) for a in range(actions)], -1)


def _simplex(rng: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Points of the simplex over the last dimension: flat, peaked, nearly deterministic, and with
    entries that are exactly 0."""
    uniform = torch.rand(shape, generator=rng, dtype=torch.float64).clamp(min=1e-12)
    sharpness = 10 ** (1.5 * torch.rand(*shape[:-1], 1, generator=rng, dtype=torch.float64))
    weights = (-uniform.log()) ** sharpness
    some = torch.rand(*shape[:-1], 1, generator=rng) < 0.15
    dropped = some & (torch.rand(shape, generator=rng) < 0.5)
    dropped[..., 0] = False
    weights = torch.where(dropped, 0.0, weights)
    return weights / weights.sum(-1, keepdim=True)
