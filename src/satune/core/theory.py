"""One line of what theory says about a step: its gain, its penalty, and what may be claimed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from satune.core.variation import Real, as_gamma, as_size, tv_from_kl

Status = Literal["positive", "plug-in positive", "not positive", "vacuous"]

SUP_FREE = "sup-free"
PAPER, PAPER_REGION = "paper", "paper, region"
PAPER_REMARK = "this form can never be positive for gamma >= 1/2; shown for reference"


@dataclass(frozen=True)
class TheoryRow:
    """J(new) - J(old) >= ``lower`` = ``gain`` - ``penalty``, by the bound called ``name``.

    "positive": an improvement, given exact values; "plug-in positive": positive with estimates in
    the place of exact values, which is no proof; "vacuous": the penalty exceeds all that the step
    could gain. ``remark``: what must be said beside it; ``basis``: what the penalty was made of.
    """

    name: str
    gain: float
    penalty: float
    status: Status
    remark: str = ""
    basis: str = ""

    @property
    def lower(self) -> float:
        return self.gain - self.penalty

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "gain": self.gain, "penalty": self.penalty}
        row |= {"lower": self.lower, "status": self.status}
        said = {"basis": self.basis, "remark": self.remark}
        return row | {key: text for key, text in said.items() if text}


def theory_status(
    gain: float, penalty: float, *, plug_in: bool, largest_gain: float = math.inf
) -> Status:
    """What L = ``gain`` and C = ``penalty`` allow to be said.

    ``plug_in``: either is an estimate from samples. ``largest_gain`` is the trivial bound on
    J(new) - J(old) (``horizon_bounds.largest_gain``, ``lab.bounds.return_change``). A penalty that
    is infinite or unknown is vacuous, an unknown gain is not positive.
    """
    if not penalty <= largest_gain or penalty == math.inf:
        return "vacuous"
    if not gain - penalty > 0:
        return "not positive"
    return "plug-in positive" if plug_in else "positive"


def theory_row(
    name: str,
    gain: float,
    penalty: float,
    *,
    plug_in: bool,
    largest_gain: float = math.inf,
    basis: str = "",
) -> TheoryRow:
    """The row with its status; "sup-free" is a plug-in by its nature, "paper" gets its remark."""
    gain, penalty = float(gain), float(penalty)
    status = theory_status(
        gain, penalty, plug_in=plug_in or name == SUP_FREE, largest_gain=float(largest_gain)
    )
    remark = PAPER_REMARK if name in (PAPER, PAPER_REGION) else ""
    return TheoryRow(name, gain, penalty, status, remark, basis)


def penalty_paper(gamma: Real, a_max: Real, sup_kl: Real) -> Tensor:
    """2 gamma A_max sqrt(delta/2)/(1-gamma)^2, for reference: L - C <= 0 whenever gamma >= 1/2.

    Above delta = 1.594 the smaller bound on TV stands in for sqrt(delta/2).
    """
    gamma = as_gamma(gamma)
    return 2 * gamma * as_size(a_max, "a_max") * tv_from_kl(sup_kl) / (1 - gamma) ** 2
