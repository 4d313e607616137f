"""How often each bound held, how tight it was, and what a positive one was followed by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ABOVE_ROUNDING = 1e3
"""Smaller bounds, in units of the tolerance, say nothing of how tight they are."""


@dataclass
class Tally:
    """Counts of one bound. ``tightness`` has the truth as a share of the bound."""

    held: int = 0
    checked: int = 0
    positive: int = 0
    decreased: int = 0
    tightness: list[Tensor] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        ratios = torch.cat(self.tightness) if self.tightness else torch.zeros(0)
        return {
            "held": self.held,
            "checked": self.checked,
            "median_tightness": float(ratios.median()) if ratios.numel() else None,
            "largest_tightness": float(ratios.max()) if ratios.numel() else None,
            "positive": self.positive,
            "decreased": self.decreased,
            **self.counts,
        }


@dataclass
class Ledger:
    """The tallies of a run. ``where`` names the batch being checked, so that a violation can be
    found again; ``violations`` are kept rather than raised."""

    where: str = ""
    tallies: dict[str, Tally] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def limit(self, name: str, truth: Tensor, bound: Tensor, tolerance: Tensor | float) -> None:
        """``truth`` [B] is at most ``bound`` [B], up to rounding."""
        slack = truth.abs() - bound
        self._hold(name, slack <= tolerance, slack)
        known = torch.isfinite(bound) & (bound > _ABOVE_ROUNDING * torch.as_tensor(tolerance))
        self.tallies[name].tightness.append((truth.abs() / bound)[known].clamp(max=1.0))

    def certificate(
        self,
        name: str,
        change: Tensor,
        gain: Tensor,
        penalty: Tensor,
        tolerance: Tensor | float,
        *,
        one_sided: bool = False,
    ) -> Tensor:
        """J' - J = ``change`` lies within ``penalty`` of ``gain`` (one-sided: not below); which
        ones certify an improvement, gain - penalty being positive [B]."""
        lower = gain - penalty
        missed = gain - change if one_sided else (gain - change).abs()
        self._hold(name, ~(missed - penalty > tolerance), missed - penalty)
        tally = self.tallies[name]
        known = torch.isfinite(penalty) & (penalty > _ABOVE_ROUNDING * torch.as_tensor(tolerance))
        error = (change - gain).abs()
        tally.tightness.append((error / penalty)[known].clamp(max=1.0))
        positive = lower > tolerance
        tally.positive += int(positive.sum())
        tally.decreased += int((positive & (change < -tolerance)).sum())
        return positive

    def count(self, name: str, key: str, number: int) -> None:
        counts = self.tallies[name].counts
        counts[key] = counts.get(key, 0) + number

    def _hold(self, name: str, held: Tensor, excess: Tensor) -> None:
        tally = self.tallies.setdefault(name, Tally())
        tally.held += int(held.sum())
        tally.checked += held.numel()
        for index in torch.nonzero(~held).flatten().tolist():
            self.violations.append(
                f"{name}: {self.where}, instance {index}: exceeded by {float(excess[index]):.3g}"
            )
