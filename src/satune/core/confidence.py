"""Lower bounds on a mean of bounded values, and how a run spends its confidence (THEORY §5).

The deciding method is chosen before the values are seen. What each asks of the values Y in [0, 1]:
betting (Waudby-Smith and Ramdas 2023): given those before it, each has the same mean, which holds
for i.i.d. draws in the order in which they were drawn. A fixed list of unlike values in a chosen
order breaks it. Empirical Bernstein (Maurer and Pontil 2009) and Hoeffding: independence is enough.
Shape suffixes: ``N`` values of one sample, ``R`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from satune.core.settings import Method

# A bet may lose this share of the capital at most; without the cap one bad value ends the game.
_CAP = 0.75
# The bracket [0, 1] halves to 2^-40 < 1e-12.
_HALVINGS = 40


def lower_bound(
    values_N: Tensor, low: float, high: float, alpha: float, method: Method = "betting"
) -> float:
    """Lower bound on the mean of ``values_N`` in [low, high], wrong with probability <= alpha.

    The values come in the order in which they were drawn; never below ``low``.
    Raises: ValueError if a value is NaN or outside the range, N < 1, or a setting is out of range.
    """
    if values_N.dim() != 1:
        raise ValueError("lower_bound: give one row of values; lower_bounds takes several")
    return float(lower_bounds(values_N[None], low, high, alpha, method)[0])


def lower_bounds(
    values_RN: Tensor, low: float, high: float, alpha: float, method: Method = "betting"
) -> Tensor:
    """``lower_bound`` of each row, float64 [R].

    Raises: ValueError as ``lower_bound`` does.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"lower_bound: range [{low}, {high}]; give finite low < high")
    if method not in METHODS:
        raise ValueError(f"lower_bound: method {method!r}; choose {', '.join(METHODS)}")
    values_RN = _measured(values_RN, low, high)
    # Division may round past 1, by one unit in the last place.
    unit_RN = ((values_RN - low) / (high - low)).clamp(0, 1)
    return (low + (high - low) * METHODS[method](unit_RN, alpha)).clamp(low, high)


def betting_lower_bound(unit_RN: Tensor, alpha: float) -> Tensor:
    """inf{m : max_t K_t(m) < 1/alpha} of each row of ``unit_RN`` in [0, 1], within 1e-12: [R].

    The end returned is the one whose capital has reached 1/alpha, hence not above the infimum; 0
    where not even m = 0 has. It lies below the row's largest value, but a row that starts high and
    ends low can have a bound above its mean: the capital's maximum counts, not its last value. Nor
    does every row's bound rise with alpha: the rates depend on it.
    Raises: ValueError if a value is outside [0, 1], there is none, or alpha is not in (0, 1).
    """
    unit_RN, _ = _measured(unit_RN, 0.0, 1.0), _check_alpha(alpha)
    target = math.log(1 / alpha)
    rates_RN = _uncapped_rates(unit_RN, alpha)

    def reached(mean_R: Tensor) -> Tensor:
        return _log_capital(unit_RN, rates_RN, mean_R).amax(-1) >= target

    # K decreases in m: K(1) <= 1 < 1/alpha, and where K(0) < 1/alpha the lower end stays at 0.
    lower_R, upper_R = unit_RN.new_zeros(unit_RN.shape[0]), unit_RN.new_ones(unit_RN.shape[0])
    for _ in range(_HALVINGS):
        middle_R = (lower_R + upper_R) / 2
        up_R = reached(middle_R)
        lower_R = torch.where(up_R, middle_R, lower_R)
        upper_R = torch.where(up_R, upper_R, middle_R)
    return lower_R


def empirical_bernstein_lower_bound(unit_RN: Tensor, alpha: float) -> Tensor:
    """mean - sqrt(2 V log(2/alpha)/N) - 7 log(2/alpha)/(3(N-1)), V with ddof 1, at least 0: [R].

    0 for N = 1. Raises: ValueError as ``betting_lower_bound`` does.
    """
    unit_RN, _ = _measured(unit_RN, 0.0, 1.0), _check_alpha(alpha)
    count, log = unit_RN.shape[-1], math.log(2 / alpha)
    if count == 1:
        return unit_RN.new_zeros(unit_RN.shape[0])
    radius_R = (2 * unit_RN.var(-1) * log / count).sqrt() + 7 * log / (3 * (count - 1))
    return (unit_RN.mean(-1) - radius_R).clamp(min=0)


def hoeffding_lower_bound(unit_RN: Tensor, alpha: float) -> Tensor:
    """mean - sqrt(log(1/alpha)/(2N)), at least 0: [R].

    Raises: ValueError as ``betting_lower_bound`` does.
    """
    unit_RN, _ = _measured(unit_RN, 0.0, 1.0), _check_alpha(alpha)
    radius = math.sqrt(math.log(1 / alpha) / (2 * unit_RN.shape[-1]))
    return (unit_RN.mean(-1) - radius).clamp(min=0)


METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "betting": betting_lower_bound,
    "empirical_bernstein": empirical_bernstein_lower_bound,
    "hoeffding": hoeffding_lower_bound,
}


@dataclass
class Spending:
    """How a run's ``confidence`` (its total probability of a false claim) is spent test by test.

    With ``decisions`` declared each test gets confidence/decisions, and there are no more tests
    than that. Without, test k gets 6 confidence/(pi^2 k^2), whose sum over all k is ``confidence``.
    Every look at a bound is a test, whatever came of it. ``used`` counts them.
    Raises: ValueError if a value lies outside its range.
    """

    confidence: float = 0.05
    decisions: int | None = None
    used: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence {self.confidence}: give a probability in (0, 1)")
        if self.decisions is not None and self.decisions < 1:
            raise ValueError(f"decisions {self.decisions}: give at least 1, or none")
        if self.used < 0 or (self.decisions is not None and self.used > self.decisions):
            raise ValueError(f"{self.used} tests used of {self.decisions} declared")

    @property
    def exhausted(self) -> bool:
        """Whether the declared number of tests is used up; never so for the open sequence."""
        return self.decisions is not None and self.used >= self.decisions

    @property
    def spent(self) -> float:
        """The probability of a false claim that the tests so far account for."""
        return math.fsum(self.share(k) for k in range(1, self.used + 1))

    def share(self, k: int) -> float:
        """The error probability of test k = 1, 2, ...; 0 beyond the declared number."""
        assert k >= 1
        if self.decisions is None:
            return 6 * self.confidence / (math.pi * k) ** 2
        return self.confidence / self.decisions if k <= self.decisions else 0.0

    def next(self) -> float:
        """Count one more test and return its error probability.

        Raises: ValueError if the declared number is used up; ask ``exhausted`` first.
        """
        if self.exhausted:
            raise ValueError(
                f"certify.decisions: all {self.decisions} declared tests are used; "
                "declare more before the run, or none for an open sequence"
            )
        self.used += 1
        return self.share(self.used)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spending:
        """What ``to_dict`` gave. Raises: ValueError if a value lies outside its range."""
        return cls(**values)


def _uncapped_rates(unit_RN: Tensor, alpha: float) -> Tensor:
    """sqrt(2 log(1/alpha) / (N sigma^2_{s-1})) for s = 1..N, from the values before s alone.

    mu_s = (1/2 + sum_{j<=s} Y_j)/(s+1), sigma^2_s = (1/4 + sum_{j<=s} (Y_j - mu_j)^2)/(s+1), and
    sigma^2_0 = 1/4.
    """
    count = unit_RN.shape[-1]
    after_N = torch.arange(2, count + 2, dtype=unit_RN.dtype)
    mean_RN = (0.5 + unit_RN.cumsum(-1)) / after_N
    variance_RN = (0.25 + (unit_RN - mean_RN).square().cumsum(-1)) / after_N
    before_RN = torch.cat([torch.full_like(unit_RN[:, :1], 0.25), variance_RN[:, :-1]], dim=-1)
    return (2 * math.log(1 / alpha) / (count * before_RN)).sqrt()


def _log_capital(unit_RN: Tensor, rates_RN: Tensor, mean_R: Tensor) -> Tensor:
    """log K_t(m) of each row at its own mean m after each value: the sum over s <= t of
    log(1 + lambda_s(m) (Y_s - m)), the capital of a gambler who bets that the mean exceeds m. If it
    is m, it reaches 1/alpha with probability <= alpha. The cap .75/m is infinite at m = 0."""
    mean_R1 = mean_R[:, None]
    rates_RN = torch.minimum(rates_RN, _CAP / mean_R1)
    return torch.log1p(rates_RN * (unit_RN - mean_R1)).cumsum(-1)


def _measured(values_RN: Tensor, low: float, high: float) -> Tensor:
    values_RN = values_RN.detach().to(device="cpu", dtype=torch.float64)
    if values_RN.dim() != 2 or values_RN.shape[-1] < 1:
        raise ValueError("lower_bound: give at least one value")
    # Asked this way round, NaN is outside.
    if not bool(((values_RN >= low) & (values_RN <= high)).all()):
        raise ValueError(f"lower_bound: a value is NaN or outside [{low}, {high}]")
    return values_RN


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"lower_bound: alpha {alpha}; give a probability in (0, 1)")
