"""One line of what theory says about a step: its gain, its penalty, and what may be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    J(new) - J(old) (``horizon_bounds.largest_gain``, ``bounds.return_change``). A penalty that is
    infinite or unknown is vacuous, an unknown gain is not positive.
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


def stage_row(
    name: str, rows: Sequence[TheoryRow], *, plug_in: bool, largest_gain: float = math.inf
) -> TheoryRow:
    """Theorem 4.4: the sum over a stage's steps, a plug-in as soon as one of them is.

    For rows whose gain was measured on the team that each step started from.
    """
    plug_in = plug_in or any(row.status == "plug-in positive" for row in rows)
    plug_in = plug_in or any(row.name == SUP_FREE for row in rows)
    gain, penalty = (math.fsum(getattr(row, key) for row in rows) for key in ("gain", "penalty"))
    status = theory_status(gain, penalty, plug_in=plug_in, largest_gain=largest_gain)
    remarks = dict.fromkeys(row.remark for row in rows if row.remark)
    return TheoryRow(name, gain, penalty, status, "; ".join(remarks))
