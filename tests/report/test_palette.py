"""Colours stay apart for every common kind of colour blindness, on light and on dark."""

from __future__ import annotations

import itertools
import math

import pytest

from satune.report.palette import DARK, GROUNDS, INKS, LIGHT, MARKERS, css

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
               (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
               (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
               (0.004733, 0.691367, 0.303900)),
}  # fmt: skip
APART = 0.12
"""Distance in OKLab; the well-known palette of Okabe and Ito has pairs at .076 by this measure."""


def linear(colour: str) -> tuple[float, ...]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)


def seen(colour: str, eye: str) -> tuple[float, ...]:
    light = linear(colour)
    return tuple(
        min(1.0, max(0.0, sum(a * b for a, b in zip(row, light, strict=True)))) for row in EYES[eye]
    )


def oklab(rgb: tuple[float, ...]) -> tuple[float, ...]:
    r, g, b = rgb
    l = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)  # noqa: E741
    m = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    s = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of relative luminances."""
    lights = [sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True))
              for x in (a, b)]  # fmt: skip
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("slots", [LIGHT, DARK], ids=["light", "dark"])
def test_slots_lie_apart(slots: tuple[str, ...], eye: str) -> None:
    nearest = min(
        (math.dist(oklab(seen(a, eye)), oklab(seen(b, eye))), a, b)
        for a, b in itertools.combinations(slots, 2)
    )
    assert nearest[0] >= APART, nearest


@pytest.mark.parametrize(("at", "slots"), [(0, LIGHT), (1, DARK)], ids=["light", "dark"])
def test_marks_and_texts_stand_out(at: int, slots: tuple[str, ...]) -> None:
    ground = GROUNDS["panel"][at]
    for colour in (*slots, INKS["held"][at]):
        assert contrast(colour, ground) >= 3.0, colour
    texts = [INKS["ink"], INKS["faint"], GROUNDS["bad"], GROUNDS["good"], GROUNDS["link"]]
    for pair in texts:
        assert contrast(pair[at], ground) >= 4.5, pair


def test_shapes_differ_beyond_the_colours() -> None:
    # Where colours come round again, the pairs of colour and shape do not, for 42 agents.
    assert len(set(MARKERS)) == len(MARKERS) == 7
    assert math.gcd(len(LIGHT), len(MARKERS)) == 1


def test_both_schemes_name_every_colour() -> None:
    for name in (*INKS, *GROUNDS, *(f"c{slot}" for slot in range(len(LIGHT)))):
        assert css().count(f"--{name}:") == 4, name  # light, by system, by switch, on paper
