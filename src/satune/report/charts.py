"""Charts and tables as plain data: what a page and a figure file are both drawn from.

A place on the x axis of a run is counted in finished sweeps: the rollout of step k of n in stage s
lies at s - 1 + (k - 1)/n, that step's outcome at s - 1 + k/n, an evaluation after stage s at s.
A number that is not finite is None, and drawn as a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Number = float | None
Colour = int | Literal["ink", "faint", "held"]
"""A slot of the palette, the ink of the page, a fainter one, or that of held-out problems."""
Outcome = Literal["accepted", "shrunk", "reverted", "refused", "idle"]
"""What became of a step: taken whole or in part, taken back by the trust region or because a number
was not finite, by the gate, or nothing was there to learn from."""
OUTCOMES: dict[Outcome, str] = {
    "accepted": "accepted",
    "shrunk": "shrunk, then accepted",
    "reverted": "reverted",
    "refused": "refused by the gate",
    "idle": "idle: nothing to learn from",
}


def number(value: Any) -> Number:
    """A finite float; None for everything else, "inf" and "nan" as texts among it."""
    try:
        found = float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name. ``low`` and ``high`` are a band behind a line, whiskers of points.

    ``marker`` is a slot of the list of shapes, None for a line without points. ``tips`` says more
    about each point than its numbers do.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    colour: Colour = "ink"
    line: Literal["solid", "dashed", "none"] = "solid"
    marker: int | None = None
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    outcomes: Sequence[Outcome] = ()
    tips: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A horizontal line with its label."""

    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Lane:
    """What became of each step of one agent, on a lane below a chart."""

    name: str
    colour: int
    x: Sequence[float]
    outcomes: Sequence[Outcome]
    tips: Sequence[str]


@dataclass(frozen=True, slots=True)
class Chart:
    """``name`` is the figure's file name, ``note`` says how to read it, ``absent`` why there is
    nothing in it. ``floor`` and ``ceiling`` are ends that the y axis has whatever the data,
    ``explained`` asks for a key of the marks by outcome. An x axis that is no logarithm counts
    stages."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    rules: Sequence[Rule] = ()
    lanes: Sequence[Lane] = ()
    floor: float | None = 0.0
    ceiling: float | None = None
    log_x: bool = False
    log_y: bool = False
    explained: bool = False
    note: str = ""
    absent: str = ""
    kind: str = "chart"

    @property
    def empty(self) -> bool:
        return not any(y is not None for series in self.series for y in series.y)


@dataclass(frozen=True, slots=True)
class Bar:
    lane: int
    start: float
    end: float
    phase: str
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Bars on lanes over seconds of work, ``colours`` by phase. ``stages`` has the second at which
    each stage began."""

    name: str
    title: str
    lanes: Sequence[str]
    phases: Sequence[str]
    colours: Sequence[Colour]
    bars: Sequence[Bar]
    stages: Sequence[tuple[int, float]] = ()
    note: str = ""
    absent: str = ""
    kind: str = "timeline"

    @property
    def empty(self) -> bool:
        return not self.bars


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are texts and numbers; a column of numbers is set flush right. ``marks`` gives a row a
    look by its index: "bad", "weak" or "good"."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""
    marks: dict[int, str] = field(default_factory=dict)
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a paragraph for whoever sees this for the first time, and what follows it."""

    id: str
    title: str
    text: str
    items: Sequence[Chart | Timeline | Table]
