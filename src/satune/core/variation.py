"""Total variation from KL, and the arguments that bounds are made of (THEORY §1).

Every function takes float64 tensors or numbers that broadcast and gives a float64 tensor. A total
variation (``tv``) lies in [0, 1], a KL in [0, inf]; KL = inf is TV = 1, never NaN. Raises:
ValueError where an argument lies outside its range. Shape suffix: ``N`` the last dimension, over
agents or steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

Real = Tensor | float

_ROUNDING = 1e-9
"""By how much a computed TV may pass 1 before it is a mistake."""


def tv_pinsker(kl: Real) -> Tensor:
    """TV <= sqrt(KL/2) in either direction of KL; may exceed 1."""
    return (as_kl(kl) / 2).sqrt()


def tv_bretagnolle_huber(kl: Real) -> Tensor:
    """TV <= sqrt(1 - exp(-KL)) in either direction of KL; never exceeds 1."""
    return (-torch.expm1(-as_kl(kl))).sqrt()


def tv_from_kl(kl: Real) -> Tensor:
    """The least of both: Pinsker's below KL = 1.594, Bretagnolle and Huber's above."""
    return torch.minimum(tv_pinsker(kl), tv_bretagnolle_huber(kl))


def joint_tv(tv_N: Real) -> Tensor:
    """TV of a product over the last dimension: <= 1 - prod(1 - TV). Of suprema or at one state."""
    return -torch.expm1(torch.log1p(-as_tv(tv_N)).sum(-1))


def as_float64(value: Real) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def as_gamma(value: Real) -> Tensor:
    gamma = as_float64(value)
    if not bool(((gamma >= 0) & (gamma < 1)).all()):
        raise ValueError("gamma outside [0, 1); use satune.core.horizon_bounds for gamma = 1")
    return gamma


def as_tv(value: Real, name: str = "total variation") -> Tensor:
    """A probability or TV; rounding past 1 is cut off. NaN passes: what is unknown stays so."""
    tv = as_float64(value)
    if bool(((tv < 0) | (tv > 1 + _ROUNDING)).any()):
        raise ValueError(f"{name} outside [0, 1]")
    return tv.clamp(max=1)


def as_kl(value: Real) -> Tensor:
    return as_size(value, "KL")


def as_size(value: Real, name: str) -> Tensor:
    size = as_float64(value)
    if bool((size < 0).any()):
        raise ValueError(f"{name} is negative")
    return size


def before(value_N: Tensor) -> Tensor:
    """Sums over the entries before each one along the last dimension; the first is 0."""
    earlier_N = value_N[..., :-1].cumsum(-1)
    return torch.cat([torch.zeros_like(value_N[..., :1]), earlier_N], dim=-1)
