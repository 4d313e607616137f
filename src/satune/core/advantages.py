"""Advantages: relative to a problem's other episodes, or by GAE with truncated traces (THEORY §6).

Shape suffixes: ``E`` episodes, ``P`` problems, ``B`` sequences, ``T`` steps of a sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from satune.core.ratios import sum_by
from satune.core.settings import Baseline


def group_advantages(
    rewards_E: Tensor,
    group_E: Tensor,
    *,
    baseline: Baseline = "mean",
    normalise: bool = True,
    clip: float | None = 5.0,
    eps: float = 1e-6,
) -> Tensor:
    """(R - b)/(sigma + eps) [E], clipped to [-clip, clip]; ``group_E`` (long) names the problem.

    b is the group's mean, the mean of the others' rewards, or the group's largest reward; sigma has
    ddof 0 and is left out without ``normalise``. A constant group gives exactly 0. Episode weights
    play no part. A non-finite reward makes its own group non-finite, no other.
    Source: THEORY §6; with the mean, max|A| = sqrt(G-1), so a clip of 5 never acts for G <= 26.
    Raises: ValueError on a group of size 1, unequal lengths, an unknown baseline, a clip <= 0.
    """
    if rewards_E.shape != group_E.shape or rewards_E.dim() != 1:
        raise ValueError(
            f"group_advantages: rewards {tuple(rewards_E.shape)} and groups "
            f"{tuple(group_E.shape)}; give one of each an episode"
        )
    if baseline not in ("mean", "leave_one_out", "max"):
        raise ValueError(
            f"group_advantages: baseline {baseline!r}; choose mean, leave_one_out or max"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"group_advantages: clip {clip}; give a positive number, or none")
    if not rewards_E.is_floating_point():
        rewards_E = rewards_E.float()
    if rewards_E.numel() == 0:
        return rewards_E
    index_E, counts_P = _groups(group_E)
    if bool((counts_P < 2).any()):
        raise ValueError(
            "group_advantages: a problem has one episode only, which has nothing to be compared "
            "with; draw at least 2 samples a problem"
        )
    problems = counts_P.numel()
    sizes_E = counts_P[index_E].to(rewards_E.dtype)
    # Rewards above the group's least: exactly 0 in a constant group, where R - mean may not be.
    excess_E = rewards_E - _extreme(rewards_E, index_E, problems, "amin")[index_E]
    mean_E = sum_by(excess_E, index_E, problems)[index_E] / sizes_E
    centred_E = excess_E - mean_E
    if baseline == "mean":
        advantages_E = centred_E
    elif baseline == "leave_one_out":
        advantages_E = centred_E * (sizes_E / (sizes_E - 1))
    else:
        advantages_E = excess_E - _extreme(excess_E, index_E, problems, "amax")[index_E]
    if normalise:
        variance_E = sum_by(centred_E**2, index_E, problems)[index_E] / sizes_E
        advantages_E = advantages_E / (variance_E.sqrt() + eps)
    return advantages_E if clip is None else advantages_E.clamp(-clip, clip)


def groups_with_variance(rewards_E: Tensor, group_E: Tensor) -> Tensor:
    """True [E] for the episodes of groups whose rewards differ: what dynamic sampling keeps.

    A group with a NaN reward has no comparable rewards and gives False.
    """
    if rewards_E.numel() == 0:
        return torch.zeros_like(rewards_E, dtype=torch.bool)
    index_E, counts_P = _groups(group_E)
    largest_P = _extreme(rewards_E, index_E, counts_P.numel(), "amax")
    smallest_P = _extreme(rewards_E, index_E, counts_P.numel(), "amin")
    return (largest_P > smallest_P)[index_E]


def truncated_traces(log_ratio_BT: Tensor) -> Tensor:
    """c_t = min(1, rho_t) [B, T] from log rho_t, the ratio of the agents already updated."""
    return log_ratio_BT.clamp(max=0.0).exp()


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    traces_BT: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    lengths: Tensor | None = None,
) -> Tensor:
    """Generalised advantages with truncated traces [B, T] (THEORY §6).

    A_t = delta_t + sum_{l>=1} (gamma lam)^l (c_{t+1} ... c_{t+l}) delta_{t+l} with
    delta_t = r_t + gamma V_{t+1} - V_t and V = 0 after the last step. c_t itself does not enter
    A_t. ``lengths`` (long) is each sequence's number of steps; what lies beyond it, NaN included,
    contributes nothing and gets 0.
    Raises: ValueError if the three shapes differ.
    """
    if not rewards_BT.shape == values_BT.shape == traces_BT.shape or rewards_BT.dim() != 2:
        raise ValueError(
            f"gae: rewards {tuple(rewards_BT.shape)}, values {tuple(values_BT.shape)} and traces "
            f"{tuple(traces_BT.shape)}; give the same [B, T] for all"
        )
    if lengths is not None:
        steps_T = torch.arange(rewards_BT.shape[1], device=rewards_BT.device)
        real_BT = steps_T < lengths.unsqueeze(1)
        rewards_BT, values_BT, traces_BT = (
            torch.where(real_BT, each, torch.zeros_like(each))
            for each in (rewards_BT, values_BT, traces_BT)
        )
    advantages: list[Tensor] = []
    zero_B = values_BT.new_zeros(values_BT.shape[0])
    next_value_B, carried_B = zero_B, zero_B
    for step in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, step] + gamma * next_value_B - values_BT[:, step]
        advantage_B = delta_B + gamma * lam * carried_B
        advantages.append(advantage_B)
        next_value_B = values_BT[:, step]
        carried_B = traces_BT[:, step] * advantage_B
    if not advantages:
        return torch.zeros_like(rewards_BT)
    return torch.stack(advantages[::-1], dim=1)


def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """Soft punishment of long answers [E], in [-1, 0], added to the reward (DAPO, §3.4).

    0 up to limit - buffer tokens, then falling linearly to -1 at ``limit`` and beyond.
    Raises: ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(
            f"overlong_penalty: buffer {buffer} and limit {limit} tokens; the buffer must lie "
            "above 0 and at most at the limit"
        )
    lengths = lengths if lengths.is_floating_point() else lengths.float()
    return ((limit - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def _groups(group_E: Tensor) -> tuple[Tensor, Tensor]:
    """Group labels as 0..P-1 [E], and the size of each group [P]."""
    _, index_E, counts_P = torch.unique(group_E, return_inverse=True, return_counts=True)
    return index_E, counts_P


def _extreme(
    values_E: Tensor, index_E: Tensor, groups: int, reduce: Literal["amin", "amax"]
) -> Tensor:
    empty_P = values_E.new_zeros(groups)
    return empty_P.scatter_reduce(0, index_E, values_E, reduce=reduce, include_self=False)
