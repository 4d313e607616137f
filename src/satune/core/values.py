"""The values of states: the loss they are learnt by, and how much of what comes they explain.

Shape suffix: ``N`` the states that a value is asked of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    values_N: Tensor, before_N: Tensor, targets_N: Tensor, weights_N: Tensor, clip: float | None
) -> Tensor:
    """Σ w max((V - y)², (V' - y)²)/2, V' the value V held within ``clip`` of ``before_N``.

    A value that has moved further than the clip towards its target gains nothing by going on.
    No gradient reaches anything but ``values_N``. Source: the value loss of PPO as its authors
    wrote it (OpenAI baselines, ppo2).
    """
    error_N = (values_N - targets_N) ** 2
    if clip is not None:
        held_N = before_N + (values_N - before_N).clamp(-clip, clip)
        error_N = torch.maximum(error_N, (held_N - targets_N) ** 2)
    return (weights_N * error_N).sum() / 2


def explained_variance(values_N: Tensor, returns_N: Tensor, weights_N: Tensor) -> float | None:
    """1 - Var(return - V)/Var(return), weighted: 1 for values that know the return, 0 for a
    constant, below 0 for what is worse. None where all returns are equal."""
    share_N = weights_N / weights_N.sum()

    def variance(each_N: Tensor) -> Tensor:
        return (share_N * (each_N - (share_N * each_N).sum()) ** 2).sum()

    whole = variance(returns_N)
    if float(whole) == 0.0:
        return None
    return float(1 - variance(returns_N - values_N) / whole)
