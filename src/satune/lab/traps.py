"""Worlds built to make the bounds tight, so that a bound too small by a factor cannot pass.

Two states. Every agent earns +x with action 0 and -x with actions 1 and 2; some actions lead from
state 0 for ever to state 1. The old policy is (1/2, 1/2, 0) everywhere, so both states have the
same value and A is the sum of the agents' x. A step moves probability a per state:

- ``leave``: state 0 gives up +x to leave, state 1 takes +x: gain and occupancy pull apart with the
  whole span, which makes the saturating form exact and the others nearly so for small a;
- ``mixed``: the same where action 1 leaves already, which makes Pinsker's inequality tight;
- ``climb``: +x everywhere, which makes the largest change of return exact.

In the game of signs x is paid for the product of all signs: alone no agent gains, together they do.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from satune.lab.mdp import World

GAMMAS = (0.001, 0.1, 0.5, 0.9, 0.99)
LEAVE, MIXED, CLIMB = range(3)


def trap_world(
    rng: torch.Generator, batch: int, agents: int, *, signs: bool
) -> tuple[World, Tensor, Tensor]:
    """Worlds, the old policy and every agent's new one, both [B, N, 2, 3]."""
    parts = torch.tensor(list(itertools.product(range(3), repeat=agents)))
    kind_B = torch.randint(3, (batch,), generator=rng)
    gamma_B = torch.tensor(GAMMAS, dtype=torch.float64)[
        torch.randint(len(GAMMAS), (batch,), generator=rng)
    ]
    # Up to half of all probability, often so little that only the leading order counts.
    exponent_BN = 4 * torch.rand(batch, agents, generator=rng, dtype=torch.float64)
    move_BN = 0.5 * 10**-exponent_BN
    size_B = 0.1 + 0.4 * torch.rand(batch, generator=rng, dtype=torch.float64)

    sign_JN = torch.where(parts == 0, 1.0, -1.0).double()
    value_J = sign_JN.prod(1) if signs else sign_JN.mean(1)
    reward_BJ = 0.5 + size_B[:, None] * value_J
    leaves_BJ = torch.where(
        (kind_B == MIXED)[:, None], (parts >= 1).any(1), (parts == 2).any(1)
    ).double()
    transition = torch.zeros(batch, 2, len(parts), 2, dtype=torch.float64)
    transition[:, 0, :, 0], transition[:, 0, :, 1] = 1 - leaves_BJ, leaves_BJ
    transition[:, 1, :, 1] = 1
    world = World(
        transition,
        reward_BJ[:, None].expand(batch, 2, -1),
        torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(batch, 2),
        gamma_B,
        torch.ones(batch, 2, agents, dtype=torch.bool),
        torch.ones(batch, 2, len(parts), dtype=torch.bool),
        parts,
    )
    old = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).expand(batch, agents, 2, 3)
    kind_B1, none_BN = kind_B[:, None], torch.zeros_like(move_BN)
    climbs_B1 = kind_B1 == CLIMB
    first_state = torch.stack(
        [
            torch.where(climbs_B1, move_BN, -move_BN),
            torch.where(climbs_B1, -move_BN, torch.where(kind_B1 == MIXED, move_BN, none_BN)),
            torch.where(kind_B1 == LEAVE, move_BN, none_BN),
        ],
        -1,
    )
    second_state = torch.stack([move_BN, -move_BN, none_BN], -1)
    return world, old, old + torch.stack([first_state, second_state], 2)
