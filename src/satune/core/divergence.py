"""What a step's measured KL says: means, quantiles, violation rates, bounds (THEORY §2, §4).

A quantile never bounds a supremum, and none of these is called a maximum that is not one.
Shape suffixes: ``T`` own tokens (states), ``N`` values, ``E`` episodes, ``P`` problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor

from satune.core.ratios import sum_by
from satune.core.trust_region import Unit

_ROUNDING = 1e-12


@dataclass(frozen=True)
class DivergenceStatistics:
    """KL between a proposal and its anchor at the states of one agent's experience, in nats.

    ``mean`` (weighted by w) and ``max`` are over token states. ``quantile`` and
    ``reverse_quantile`` are over the chosen unit's sums, weighted by w, and ``violation_share`` is
    the share of these above delta, weighted likewise; ``violation_rate`` is the
    share of problems with a unit sum above delta, ``violation_ucb`` its one-sided Clopper-Pearson
    upper bound, ``level_shifted_quantile`` the DKW bound on the same quantile of each problem's
    largest unit sum, +inf where there are too few problems. The two bounds count every visited
    state alike, so they speak about the policy that produced the episodes, which is the anchor's
    team only when all weights are 1. ``trajectory`` holds under "forward" (KL(this‖anchor)) and
    "reverse" the mean over problems of the mean over episodes of w times the sum over own tokens.
    What was not measured is None; a NaN among the values makes its statistics NaN.
    """

    mean: float
    quantile: float
    max: float
    trajectory: dict[str, float]
    violation_share: float
    violation_rate: float
    violation_ucb: float
    reverse_quantile: float | None
    level_shifted_quantile: float
    states: int
    problems: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name, without what was not measured."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["trajectory"] = dict(self.trajectory)
        return {name: value for name, value in values.items() if value is not None}


def divergence_statistics(
    kl_T: Tensor,
    reverse_T: Tensor | None,
    episode_T: Tensor,
    turn_T: Tensor,
    weights_E: Tensor,
    problem_E: Tensor,
    *,
    delta: float,
    quantile: float = 0.99,
    unit: Unit = "token",
    confidence: float = 0.95,
) -> DivergenceStatistics:
    """Summarise KL(this‖anchor) ``kl_T`` and KL(anchor‖this) ``reverse_T`` of one agent's states.

    ``episode_T`` (long) points into ``weights_E`` (w of THEORY §6) and ``problem_E`` (long labels);
    ``turn_T`` (long) tells an episode's messages apart, numbered in any way. ``unit`` says over
    what KL is summed before quantiles and violations are taken: a token state, a turn, or all of
    an episode. Without a single state every statistic but the counts is NaN.
    Raises: ValueError if lengths disagree or a setting lies outside its range.
    """
    _check(kl_T, reverse_T, episode_T, turn_T, weights_E, problem_E, quantile, confidence)
    episode_T, turn_T = episode_T.cpu(), turn_T.cpu()
    kl_T, weights_E = _measured(kl_T), _measured(weights_E)
    reverse_T = None if reverse_T is None else _measured(reverse_T)
    _, problem_E = torch.unique(problem_E.cpu(), return_inverse=True)
    problems = int(problem_E.max()) + 1 if problem_E.numel() else 0
    episodes = weights_E.numel()
    unit_T, episode_U = units_of(unit, episode_T, turn_T, episodes)

    def unit_sums(values_T: Tensor) -> Tensor:
        return values_T if unit == "token" else sum_by(values_T, unit_T, episode_U.numel())

    def trajectory_mean(values_T: Tensor) -> float:
        sums_E = weights_E * sum_by(values_T, episode_T, episodes)
        count_P = sum_by(torch.ones_like(sums_E), problem_E, problems)
        return float((sum_by(sums_E, problem_E, problems) / count_P).mean())

    kl_U, weights_U, weights_T = unit_sums(kl_T), weights_E[episode_U], weights_E[episode_T]
    trajectory = {"forward": trajectory_mean(kl_T)}
    reverse_quantile = None
    if reverse_T is not None:
        trajectory["reverse"] = trajectory_mean(reverse_T)
        reverse_quantile = weighted_quantile(unit_sums(reverse_T), weights_U, quantile)
    largest_P = torch.zeros(problems, dtype=torch.float64)
    largest_P = largest_P.scatter_reduce(0, problem_E[episode_U], kl_U, reduce="amax")
    measured = kl_T.numel() > 0 and not bool(kl_T.isnan().any())
    violations = int((largest_P > delta).sum())
    shifted, _ = level_shifted_quantile(largest_P, 1 - quantile, 1 - confidence)
    return DivergenceStatistics(
        mean=float((weights_T * kl_T).sum() / weights_T.sum()),
        quantile=weighted_quantile(kl_U, weights_U, quantile) if measured else math.nan,
        max=float(kl_T.max()) if measured else math.nan,
        trajectory=trajectory if kl_T.numel() else dict.fromkeys(trajectory, math.nan),
        violation_share=float((weights_U * (kl_U > delta)).sum() / weights_U.sum())
        if measured
        else math.nan,
        violation_rate=violations / problems if measured else math.nan,
        violation_ucb=clopper_pearson(violations, problems, confidence) if measured else math.nan,
        reverse_quantile=reverse_quantile,
        level_shifted_quantile=shifted if measured else math.nan,
        states=kl_T.numel(),
        problems=problems,
    )


def weighted_quantile(values_N: Tensor, weights_N: Tensor, q: float) -> float:
    """The smallest value whose cumulative weight reaches q of the total: an order statistic.

    q = 1 is the largest value of positive weight. Infinite values are allowed. NaN if a value or
    weight is NaN, if a weight is infinite, or if there is no weight.
    Raises: ValueError if q is outside [0, 1], a weight is negative or the lengths differ.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"weighted_quantile: level {q}; give a value in [0, 1]")
    if values_N.shape != weights_N.shape or values_N.dim() != 1:
        raise ValueError("weighted_quantile: give one weight a value")
    values, weights = _measured(values_N), _measured(weights_N)
    if bool((weights < 0).any()):
        raise ValueError("weighted_quantile: a weight is negative; weights start at 0")
    if bool(values.isnan().any()) or not bool(weights.isfinite().all()):
        return math.nan
    values, weights = values[weights > 0], weights[weights > 0]
    if values.numel() == 0:
        return math.nan
    if q == 1:
        return float(values.max())
    values, order = values.sort()
    cumulative = weights[order].cumsum(0)
    # q x total may round up past the step it names (0.07 x 100 > 7); a relative 1e-12 forgives it.
    target = (q - _ROUNDING) * cumulative[-1]
    return float(values[int(torch.searchsorted(cumulative, target))])


def level_shifted_quantile(
    max_per_problem_P: Tensor, a: float, eta: float = 0.05
) -> tuple[float, int]:
    """An upper bound on the (1-a)-quantile of a problem's largest KL, and the number of problems.

    Holds with probability 1 - eta: the order statistic at level 1 - a + epsilon,
    epsilon = sqrt(log(1/eta)/(2N)) (DKW, THEORY §2); +inf if a < epsilon, that is, with too few
    problems (a = .05 needs 600, a = .01 needs 14,979 at eta = .05). It presumes N independent
    problems on which nothing was trained. It bounds no supremum. NaN if a value is NaN.
    Raises: ValueError unless 0 <= a <= 1 and 0 < eta <= 1/2.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"level_shifted_quantile: a = {a}; give a value in [0, 1]")
    if not 0 < eta <= 0.5:
        raise ValueError(f"level_shifted_quantile: eta = {eta}; give a value in (0, 1/2]")
    values = _measured(max_per_problem_P)
    problems = values.numel()
    if bool(values.isnan().any()):
        return math.nan, problems
    if problems == 0:
        return math.inf, 0
    epsilon = math.sqrt(math.log(1 / eta) / (2 * problems))
    if a < epsilon:
        return math.inf, problems
    rank = min(problems, max(1, math.ceil((1 - a + epsilon) * problems)))
    return float(values.sort().values[rank - 1]), problems


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound on a probability of which ``k`` of ``n`` independent trials came
    true; 1 if k = n.

    Raises: ValueError unless 0 <= k <= n and 0 < confidence < 1.
    """
    if not 0 <= k <= n:
        raise ValueError(f"clopper_pearson: {k} of {n}; give 0 <= k <= n")
    if not 0 < confidence < 1:
        raise ValueError(f"clopper_pearson: confidence {confidence}; give a value in (0, 1)")
    # betaincinv is scipy.stats.beta.ppf without the second that importing scipy.stats takes.
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, confidence))


def units_of(unit: Unit, episode_T: Tensor, turn_T: Tensor, episodes: int) -> tuple[Tensor, Tensor]:
    """To which unit each token belongs [T], and to which episode each unit belongs [U].

    An episode without own tokens is a trajectory whose sum is 0; it holds no turn and no state.
    """
    if unit == "token":
        return torch.arange(episode_T.numel()), episode_T
    if unit == "trajectory":
        return episode_T, torch.arange(episodes)
    # Pairs, because turns may be numbered anew in each episode.
    pairs_UE, unit_T = torch.unique(
        torch.stack([episode_T, turn_T], dim=1), dim=0, return_inverse=True
    )
    return unit_T, pairs_UE[:, 0]


def _measured(values: Tensor) -> Tensor:
    return values.detach().to(device="cpu", dtype=torch.float64)


def _check(
    kl_T: Tensor,
    reverse_T: Tensor | None,
    episode_T: Tensor,
    turn_T: Tensor,
    weights_E: Tensor,
    problem_E: Tensor,
    quantile: float,
    confidence: float,
) -> None:
    same_T = [episode_T, turn_T, *([] if reverse_T is None else [reverse_T])]
    if kl_T.dim() != 1 or any(each.shape != kl_T.shape for each in same_T):
        raise ValueError("divergence_statistics: give one KL, episode and turn a token")
    if weights_E.shape != problem_E.shape or weights_E.dim() != 1:
        raise ValueError("divergence_statistics: give one weight and one problem an episode")
    if not 0 < quantile <= 1:
        raise ValueError(f"divergence_statistics: quantile {quantile}; give a value in (0, 1]")
    if not 0.5 <= confidence < 1:
        raise ValueError(
            f"divergence_statistics: confidence {confidence}; give a value in [1/2, 1)"
        )
