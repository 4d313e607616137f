"""Means with intervals, and the chance that one of k samples is right."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from satune.types import UserError

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``problems`` with its 95% interval (None where it cannot be had)."""

    mean: float
    low: float | None
    high: float | None
    problems: int

    @property
    def interval(self) -> list[float] | None:
        """[low, high], or None."""
        return None if self.low is None or self.high is None else [self.low, self.high]


def mean_estimate(values: Sequence[float], lowest: float, highest: float) -> Estimate:
    """Mean of independent values in [lowest, highest] and its normal 95% interval, cut to it."""
    mean = fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    half = Z_95 * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, max(lowest, mean - half), min(highest, mean + half), len(values))


def score_interval(scores: Sequence[float]) -> list[float] | None:
    """95% interval of the mean of independent scores in [0, 1], sound at the edges where it can be.

    Scores that are all 0 or 1 have Wilson's interval (1927): the p for which
    |mean - p| <= z sqrt(p (1 - p) / n). Others have that of ``mean_estimate``, which does not exist
    for one score or for scores that are all equal.
    """
    n = len(scores)
    if set(scores) <= {0.0, 1.0}:
        mean, z2 = fmean(scores), Z_95**2
        centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
        half = Z_95 * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # At the edges the bound is the edge itself; rounding would leave it beside.
        return [
            0.0 if mean == 0.0 else max(0.0, centre - half),
            1.0 if mean == 1.0 else min(1.0, centre + half),
        ]
    return None if len(set(scores)) == 1 else mean_estimate(scores, 0.0, 1.0).interval


def places_by(names: Iterable[str | None]) -> dict[str, list[int]]:
    """The places of each name, names in the order in which they come up; None is no name."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(place)
    return places


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the unbiased estimate, from ``n`` samples of which
    ``correct`` are right, of the chance that at least one of ``k`` is (Chen et al. 2021, §2.1).

    Raises UserError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise UserError(f"evaluation: pass@{k} needs k from 1 to the number of samples, {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean_components(components: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each component's mean over the grades that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for grade in components:
        for name, value in grade.items():
            values[name].append(value)
    return {name: fmean(found) for name, found in values.items()}
