"""Colours and shapes: told apart with each common kind of colour blindness, on light and on dark.

``tests/report/test_palette.py`` holds how far they lie apart, simulated, and their contrast.
"""

from __future__ import annotations

from satune.report.charts import Colour, Outcome

LIGHT = ("#404ccd", "#e03c08", "#2c9e86", "#a873ec", "#8a1a6d", "#3f2d02")
DARK = ("#3296ff", "#ff5a4c", "#10f6ae", "#b2aecd", "#b967b0", "#feb00f")
"""By slot: of agents, runs or phases. They come round again after six; shapes after seven."""
PAPER, NIGHT = "#ffffff", "#15171c"
INKS = {
    "ink": ("#22252b", "#e8eaee"),
    "faint": ("#6d727c", "#8d93a0"),
    "held": ("#8a1a6d", "#f0b6e6"),
}
SHAPES = ("circle", "square", "up", "diamond", "down", "plus", "cross")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""The same shapes as matplotlib calls them."""
FILLS: dict[Outcome, str] = {
    "accepted": "full", "shrunk": "left", "reverted": "none", "refused": "none", "idle": "none",
}  # fmt: skip
"""How the mark of a step is filled; a refused one is crossed out, an idle one is a dash."""


def light(colour: Colour) -> str:
    return LIGHT[colour % len(LIGHT)] if isinstance(colour, int) else INKS[colour][0]


def css() -> str:
    """The custom properties of both schemes."""
    rows = []
    for at, (scheme, surface) in enumerate(((LIGHT, PAPER), (DARK, NIGHT))):
        named = {f"c{slot}": colour for slot, colour in enumerate(scheme)}
        named |= {name: pair[at] for name, pair in INKS.items()} | {"surface": surface}
        rows.append("".join(f"--{name}:{value};" for name, value in named.items()))
    lit, dark = rows
    return (
        f":root{{{lit}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-scheme=light]){{{dark}}}}}"
        f":root[data-scheme=dark]{{{dark}}}"
        f"@media print{{:root:root{{{lit}}}}}"
    )
