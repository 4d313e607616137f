"""What a step or stage of a discounted team can claim: THEORY §2 and §3, gamma < 1.

Every function takes float64 tensors or numbers that broadcast and gives a float64 tensor. ``gamma``
lies in [0, 1), a total variation (``tv``) in [0, 1], a KL in [0, inf]. KL = inf is TV = 1, never
NaN. "sup" is a supremum over states, "mean" an expectation under the occupancy of the old policy.
Returns are sums of discounted rewards. Raises: ValueError where an argument lies outside its range.
Shape suffix: ``N`` the agents of a stage, in the order of their updates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from satune.core.divergence import clopper_pearson
from satune.core.theory import penalty_paper
from satune.core.variation import (
    Real,
    as_float64,
    as_gamma,
    as_kl,
    as_size,
    as_tv,
    before,
    joint_tv,
    tv_from_kl,
)


def mean_tv_from_violations(delta: Real, rate: Real) -> Tensor:
    """Mean TV where KL exceeds ``delta`` with probability ``rate``: (1-p) TV(delta) + p.

    ``rate`` is the exact probability, or its upper confidence bound.
    """
    rate = as_tv(rate, "rate")
    return (1 - rate) * tv_from_kl(delta) + rate


def mean_tv_upper(delta: Real, violations: int, problems: int, confidence: float = 0.95) -> Tensor:
    """The same with the Clopper-Pearson bound of a rate seen on independent problems."""
    return mean_tv_from_violations(delta, clopper_pearson(violations, problems, confidence))


# Occupancies


def occupancy_shift_mean(gamma: Real, mean_tv: Real) -> Tensor:
    """|d' - d|_1 <= 2 gamma/(1-gamma) E_d TV (Lemma 4.1); may exceed 2."""
    gamma = as_gamma(gamma)
    return 2 * gamma * as_tv(mean_tv) / (1 - gamma)


def occupancy_shift_sup(gamma: Real, sup_tv: Real) -> Tensor:
    """|d' - d|_1 <= 2 gamma a/(1 - gamma(1-a)), a = sup TV (Lemma 4.1, never above 2)."""
    gamma, sup_tv = as_gamma(gamma), as_tv(sup_tv)
    # 1 - gamma (1-a), without the cancellation for gamma near 1.
    return 2 * gamma * sup_tv / ((1 - gamma) + gamma * sup_tv)


def occupancy_shift(gamma: Real, mean_tv: Real, sup_tv: Real) -> Tensor:
    """The least of both forms of Lemma 4.1."""
    return torch.minimum(occupancy_shift_mean(gamma, mean_tv), occupancy_shift_sup(gamma, sup_tv))


def stale_occupancy_shift(gamma: Real, sup_kl_N: Real) -> Tensor:
    """|d(before agent i) - d(before the stage)|_1 for i = 1..N: 2 gamma/(1-gamma) sum_{k<i} TV_k.

    With TV from KL this is sqrt(2) gamma/(1-gamma) sum sqrt(delta_k) of THEORY §3, at most 2.
    """
    gamma = as_gamma(gamma).unsqueeze(-1)
    return (2 * gamma * before(tv_from_kl(sup_kl_N)) / (1 - gamma)).clamp(max=2)


# One step: J(new) - J(old) >= L - C with L = E_old[g]/(1-gamma)


def penalty_trpo(gamma: Real, a_max: Real, sup_tv: Real) -> Tensor:
    """4 gamma A_max a^2/(1-gamma)^2; with a = ``tv_from_kl(delta)`` linear in delta."""
    gamma = as_gamma(gamma)
    return 4 * gamma * as_size(a_max, "a_max") * as_tv(sup_tv) ** 2 / (1 - gamma) ** 2


def penalty_span(gamma: Real, span: Real, sup_tv: Real, mean_tv: Real) -> Tensor:
    """2 gamma Sp a E[TV]/(1-gamma)^2, Sp = sup_s (max_a A - min_a A)."""
    return as_size(span, "span") * as_tv(sup_tv) * _shift_cost(gamma, mean_tv)


def penalty_cpo(gamma: Real, max_gain: Real, mean_tv: Real) -> Tensor:
    """2 gamma max_s|g| E[TV]/(1-gamma)^2, g(s) = E_{a~new} A(s, a)."""
    return as_size(max_gain, "max_gain") * _shift_cost(gamma, mean_tv)


def penalty_saturating(gamma: Real, span: Real, sup_tv: Real) -> Tensor:
    """Sp a times ``occupancy_shift_sup`` over 1-gamma: never above 2 gamma Sp a/(1-gamma)."""
    shift = occupancy_shift_sup(gamma, sup_tv)
    return as_size(span, "span") * as_tv(sup_tv) * shift / (1 - as_gamma(gamma))


def step_penalties(
    gamma: Real,
    *,
    a_max: Real,
    span: Real,
    sup_kl: Real,
    sup_tv: Real,
    mean_tv: Real,
    max_gain: Real,
) -> dict[str, Tensor]:
    """Every penalty of Theorem 4.2 by its name in THEORY §2."""
    return {
        "paper": penalty_paper(gamma, a_max, sup_kl),
        "trpo": penalty_trpo(gamma, a_max, sup_tv),
        "span": penalty_span(gamma, span, sup_tv, mean_tv),
        "cpo": penalty_cpo(gamma, max_gain, mean_tv),
        "saturating": penalty_saturating(gamma, span, sup_tv),
    }


def least_penalty(penalties: Mapping[str, Tensor]) -> Tensor:
    """The least of the corrected forms; the paper's is for reference only."""
    corrected = [value for name, value in penalties.items() if name != "paper"]
    return torch.stack(torch.broadcast_tensors(*corrected)).amin(0)


def return_change(gamma: Real, span: Real, sup_tv: Real) -> Tensor:
    """|J' - J| <= Sp a/(1-gamma) (Theorem 4.5): the most that a step can gain or lose."""
    return as_size(span, "span") * as_tv(sup_tv) / (1 - as_gamma(gamma))


def bias_cost(gamma: Real, bias: Real) -> Tensor:
    """What an advantage that is wrong by up to ``bias`` costs L = E[rho A]/(1-gamma)."""
    return as_size(bias, "bias") / (1 - as_gamma(gamma))


def bias_cost_centred(gamma: Real, bias: Real, sup_tv: Real) -> Tensor:
    """The same for the centred surrogate E[(rho-1) A]/(1-gamma): 2 a bias/(1-gamma)."""
    return 2 * as_tv(sup_tv) * bias_cost(gamma, bias)


# A stage


def stage_lower(gain_N: Real, penalty_N: Real) -> Tensor:
    """J(after) - J(before the stage) >= sum of L_i - C_i over the last dimension (Theorem 4.4).

    In any order, for L_i under the occupancy and advantage of the team that step i started from.
    """
    return (as_float64(gain_N) - as_float64(penalty_N)).sum(-1)


def penalty_fresh(gamma: Real, max_gain_N: Real, sup_tv_N: Real) -> Tensor:
    """sum_i max|g_i| 2 gamma a_i/(1-gamma)^2: every agent learns from its own team's states."""
    gamma_N = as_gamma(gamma).unsqueeze(-1)
    return (as_size(max_gain_N, "max_gain") * _shift_cost(gamma_N, sup_tv_N)).sum(-1)


def penalty_stale(gamma: Real, max_gain_N: Real, sup_tv_N: Real) -> Tensor:
    """sum_i max|g_i| 2 gamma/(1-gamma)^2 sum_{k<=i} a_k: states from before the stage.

    g_i is still the gain under the right advantage, that of the team before step i.
    """
    gamma = as_gamma(gamma).unsqueeze(-1)
    reached_N = as_tv(sup_tv_N).cumsum(-1)
    return (as_size(max_gain_N, "max_gain") * 2 * gamma * reached_N / (1 - gamma) ** 2).sum(-1)


def penalty_naive(gamma: Real, a_max: Real, sup_kl_N: Real, sup_tv_N: Real | None = None) -> Tensor:
    """|J(after) - J(before) - sum of naive L_i|: states and advantages from before the stage.

    2 gamma A_max sum delta_i/(1-gamma)^2 + A_max/(1-gamma) (prod(1+2a_i) - 1 - 2 sum a_i), A_max of
    the team before the stage; the first term with the least bound on the joint TV.
    """
    gamma, a_max = as_gamma(gamma), as_size(a_max, "a_max")
    kl_N = as_kl(sup_kl_N)
    tv_N = tv_from_kl(kl_N) if sup_tv_N is None else as_tv(sup_tv_N)
    joint = torch.minimum(tv_from_kl(kl_N.sum(-1)), joint_tv(tv_N))
    return penalty_trpo(gamma, a_max, joint) + a_max * _interaction(2 * tv_N) / (1 - gamma)


# Predictions and rates


def natural_gradient_kappa(gradient: Tensor, fisher: Tensor) -> Tensor:
    """kappa = sqrt(2 h' F^-1 h) of Theorem 4.7; h [.., D] = grad L, ``fisher`` [.., D, D]."""
    gradient, fisher = as_float64(gradient), as_float64(fisher)
    solved = torch.linalg.solve(fisher, gradient.unsqueeze(-1)).squeeze(-1)
    return (2 * (gradient * solved).sum(-1)).clamp(min=0).sqrt()


def predicted_gain(kappa: Real, curvature: Real, delta: Real) -> Tensor:
    """kappa sqrt(delta) - c delta, c = L_loc/lambda_min(F) (Theorem 4.7): never evidence."""
    kappa, curvature = as_size(kappa, "kappa"), as_size(curvature, "curvature")
    root = as_kl(delta).sqrt()
    # Factored, and 0 inf taken as 0, so that delta = inf does not give inf - inf.
    loss = torch.where(curvature == 0, 0.0, curvature * root)
    slope = kappa - loss
    return torch.where((root == 0) | (slope == 0), 0.0, root * slope)


def best_delta(kappa: Real, curvature: Real) -> Tensor:
    """The delta that maximises ``predicted_gain``: (kappa/2c)^2; inf without curvature."""
    kappa, curvature = as_size(kappa, "kappa"), as_size(curvature, "curvature")
    return torch.where(kappa == 0, 0.0, (kappa / (2 * curvature)) ** 2)


def smoothness(gamma: Real, a_max: Real, score: Real, curvature: Real) -> Tensor:
    """L = A_max (B2 + B1^2)/(1-gamma) of Theorem 4.8.

    ``score`` B1 >= |grad log pi|, ``curvature`` B2 >= |Hessian of log pi|.
    """
    size = as_size(curvature, "curvature") + as_size(score, "score") ** 2
    return as_size(a_max, "a_max") * size / (1 - as_gamma(gamma))


def rate(smooth: Real, gap: Real, steps: Real) -> Tensor:
    """min_k |G_k|^2 <= 2 L (G* - G0)/K after K steps of size 1/L (Theorem 4.8, convex blocks)."""
    return 2 * as_size(smooth, "smooth") * as_size(gap, "gap") / as_float64(steps)


def hoeffding_radius(bound: Real, count: Real, eta: Real, gamma: Real = 0.0) -> Tensor:
    """2B sqrt(log(2/eta)/(2N))/(1-gamma) for |rho A| <= B and N independent problems.

    Twice what Theorem 4.9 prints, because [-B, B] is 2B wide. The function must be fixed
    independently of the samples. ``gamma`` 0 leaves the mean of rho A itself; N = 0 gives inf.
    """
    eta = as_float64(eta)
    if not bool(((eta > 0) & (eta < 1)).all()):
        raise ValueError("hoeffding_radius: eta outside (0, 1)")
    bound, count = as_size(bound, "bound"), as_size(count, "count")
    return 2 * bound * ((2 / eta).log() / (2 * count)).sqrt() / (1 - as_gamma(gamma))


def _shift_cost(gamma: Real, mean_tv: Real) -> Tensor:
    return occupancy_shift_mean(gamma, mean_tv) / (1 - as_gamma(gamma))


def _interaction(x_N: Tensor) -> Tensor:
    """prod(1 + x) - 1 - sum x for x >= 0, as the sum of x_k (prod_{j<k}(1 + x_j) - 1).

    No term is negative, so nothing cancels.
    """
    return (x_N * torch.expm1(before(torch.log1p(x_N)))).sum(-1)
