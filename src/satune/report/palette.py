"""Colours and shapes: told apart with each common kind of colour blindness, on light and on dark.

``tests/report/test_palette.py`` holds how far they lie apart, simulated, and their contrast.
"""

from __future__ import annotations

from satune.report.charts import Colour

LIGHT = ("#404ccd", "#e03c08", "#2c9e86", "#a873ec", "#8a1a6d", "#3f2d02")
DARK = ("#3296ff", "#ff5a4c", "#10f6ae", "#b2aecd", "#b967b0", "#feb00f")
"""By slot: of agents, runs or phases. They come round again after six; shapes after seven."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""matplotlib's names of the page's shapes, by slot."""
INKS = {
    "ink": ("#22252b", "#e8eaee"), "faint": ("#6d727c", "#8d93a0"), "held": ("#8a1a6d", "#f0b6e6"),
}  # fmt: skip
GROUNDS = {
    "panel": ("#ffffff", "#15171c"), "page": ("#f5f6f8", "#0d0f12"), "line": ("#dfe2e8", "#2b2f37"),
    "grid": ("#e9ebef", "#23262d"), "soft": ("#eef0f4", "#1d2027"), "bad": ("#b3261e", "#ff8a7d"),
    "good": ("#1f7a4d", "#62d49b"), "link": ("#2f3cc0", "#9db4ff"), "heat": ("#e03c08", "#ff7a4a"),
}  # fmt: skip
"""On light and on dark. Charts lie on ``panel``."""


def light(colour: Colour) -> str:
    """What a figure on white is drawn with."""
    return LIGHT[colour % len(LIGHT)] if isinstance(colour, int) else INKS[colour][0]


def css() -> str:
    """The custom properties of both schemes. Paper is light."""
    schemes = []
    for at, (name, slots) in enumerate((("light", LIGHT), ("dark", DARK))):
        named = {f"c{slot}": colour for slot, colour in enumerate(slots)}
        named |= {key: pair[at] for key, pair in (INKS | GROUNDS).items()}
        rows = "".join(f"--{key}:{value};" for key, value in named.items())
        schemes.append(f"color-scheme:{name};{rows}")
    lit, dark = schemes
    return (
        f":root{{{lit}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-scheme=light]){{{dark}}}}}"
        f":root[data-scheme=dark]{{{dark}}}"
        f"@media print{{:root:root{{{lit}}}}}"
    )
