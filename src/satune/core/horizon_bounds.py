"""What a step of a team of language models can claim: THEORY §4, gamma = 1, terminal R in [0, 1].

An own step is one place where the updated agent acts: a whole message (turn) or one token. All
bounds here hold at either granularity; at the token's they are vacuous in practice. Conventions
are those of ``satune.core.variation``; the new policy puts no mass where the old one has none.
Shape suffixes: ``H`` own steps in order, ``E`` episodes, ``N`` agents (or seats) updated together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from satune.core.variation import (
    Real,
    as_float64,
    as_kl,
    as_size,
    as_tv,
    before,
    joint_tv,
    tv_bretagnolle_huber,
    tv_from_kl,
    tv_pinsker,
)


def prefix_tv_forms(
    *,
    mean_tv_H: Real | None = None,
    sup_tv_H: Real | None = None,
    mean_kl_H: Real | None = None,
) -> dict[str, Tensor]:
    """Every bound on TV_{<h}, the TV of what happened before own step h [.., H], by name.

    ``mean``: sum_{k<h} E_old TV_k; ``sup``: 1 - prod_{k<h}(1 - a_k); ``pinsker`` and
    ``bretagnolle_huber`` from K_{<h} = sum_{k<h} E_old KL_k. ``mean_kl_H`` is KL(old‖new) per own
    step, averaged over old rollouts; exact per token, it needs no supremum. Only the forms whose
    argument is given.
    Raises: ValueError if none is given or one lies outside its range.
    """
    forms: dict[str, Tensor] = {}
    if mean_tv_H is not None:
        forms["mean"] = before(as_tv(mean_tv_H))
    if sup_tv_H is not None:
        forms["sup"] = -torch.expm1(before(torch.log1p(-as_tv(sup_tv_H))))
    if mean_kl_H is not None:
        kl_H = before(as_kl(mean_kl_H))
        forms["pinsker"] = tv_pinsker(kl_H)
        forms["bretagnolle_huber"] = tv_bretagnolle_huber(kl_H)
    if not forms:
        raise ValueError("prefix_tv_forms: give a mean TV, a sup TV or a mean KL")
    return forms


def prefix_tv(
    *,
    mean_tv_H: Real | None = None,
    sup_tv_H: Real | None = None,
    mean_kl_H: Real | None = None,
) -> Tensor:
    """The least of ``prefix_tv_forms`` [.., H]."""
    forms = prefix_tv_forms(mean_tv_H=mean_tv_H, sup_tv_H=sup_tv_H, mean_kl_H=mean_kl_H)
    return torch.stack(torch.broadcast_tensors(*forms.values())).amin(0).clamp(max=1)


def penalty_horizon(sup_tv_H: Real, prefix_tv_H: Real) -> Tensor:
    """|J' - J - L| <= 2 sum_h a_h TV_{<h}, L = sum_h E_old[(r_h - 1)(R - b)].

    ``prefix_tv_H`` from ``prefix_tv``. One own step: 0.
    """
    return 2 * (as_tv(sup_tv_H) * as_tv(prefix_tv_H)).sum(-1)


def penalty_uniform(sup_kl: Real, steps: int) -> Tensor:
    """The same with nothing known but sup KL(old‖new) of a step and how many own steps there are.

    Two steps: at most delta; three: at most 2.42 delta. Grows like steps^1.5.
    Raises: ValueError if ``steps`` is negative.
    """
    if steps < 0:
        raise ValueError(f"penalty_uniform: {steps} own steps; give at least 0")
    kl = as_kl(sup_kl)
    kl_H = kl.unsqueeze(-1).expand(*kl.shape, steps)
    if steps == 0:
        return torch.zeros_like(kl)
    tv_H = tv_from_kl(kl_H)
    return penalty_horizon(tv_H, prefix_tv(sup_tv_H=tv_H, mean_kl_H=kl_H))


def penalty_one_turn(most_own_turns: Real) -> Tensor:
    """0 where no episode can hold more than one own turn: L is then J' - J. inf elsewhere.

    Own turns are those of every seat that shares the agent's weights, or of every agent updated
    at once; turns of one moment count as one. The claim presumes a fixed router and episodes of the
    very team that the step starts from (else weights w).
    """
    turns = as_size(most_own_turns, "most_own_turns")
    return torch.where(turns <= 1, 0.0, torch.inf).to(torch.float64)


def penalty_sup_free(log_ratio_EH: Tensor, weights_E: Tensor | None = None) -> Tensor:
    """1/2 sum_h E_old[|r_{<h} - 1| |r_h - 1|]: no supremum, but an expectation.

    ``log_ratio_EH`` [.., E, H] is log(new/old) of own step h, 0 where the episode has none;
    ``weights_E`` the episodes' probabilities under old, or weights that are normalised here (all
    alike if not given). From samples it is an estimate, so a row made of it is at best "plug-in
    positive".
    """
    log_ratio_EH = as_float64(log_ratio_EH)
    prefix_EH, own_EH = torch.expm1(before(log_ratio_EH)), torch.expm1(log_ratio_EH)
    # A ratio that overflows behind a prefix of 1 adds nothing.
    unmoved_EH = (prefix_EH == 0) | (own_EH == 0)
    term_E = 0.5 * torch.where(unmoved_EH, 0.0, prefix_EH * own_EH).abs().sum(-1)
    if weights_E is None:
        return term_E.mean(-1)
    weights_E = as_size(weights_E, "weight")
    # An episode that old never draws may have an infinite ratio.
    term_E = torch.where(weights_E > 0, term_E * weights_E, 0.0)
    return term_E.sum(-1) / weights_E.sum(-1)


def largest_gain(trajectory_kl: Real) -> Tensor:
    """min(1, sqrt(K/2), sqrt(1-exp(-K))): all that J' - J can be. A penalty above it is vacuous."""
    return tv_from_kl(trajectory_kl)


def updated_together(
    *,
    sup_tv_NH: Real | None = None,
    mean_tv_NH: Real | None = None,
    mean_kl_NH: Real | None = None,
) -> dict[str, Tensor]:
    """The arguments of ``prefix_tv`` [.., H] for agents, or seats of shared weights, moved at once.

    H runs over the union of their own steps (moments); an agent that does not act there has 0. The
    TV of a moment is at most 1 - prod(1 - a_i), its mean at most the sum of means, KL adds. The sum
    of the agents' own L_i bounds nothing here: L is made of r = prod r_i.
    """
    joint: dict[str, Tensor] = {}
    if sup_tv_NH is not None:
        joint["sup_tv_H"] = joint_tv(as_tv(sup_tv_NH).transpose(-1, -2))
    if mean_tv_NH is not None:
        joint["mean_tv_H"] = as_tv(mean_tv_NH).sum(-2).clamp(max=1)
    if mean_kl_NH is not None:
        joint["mean_kl_H"] = as_kl(mean_kl_NH).sum(-2)
    return joint
