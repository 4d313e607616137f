"""Units and nouns behind a number."""

from __future__ import annotations

import pytest

from satune.tasks.maths.units import singular, unit_of


@pytest.mark.parametrize(
    ("phrase", "unit"),
    [
        ("centimetres", "cm"), ("square cm", "cm^2"), ("cm^{2}", "cm^2"),
        ("miles per hour", "mi/h"), ("mph", "mi/h"), ("units", ""), ("square units", ""),
        ("possible values", "possible value"),
        ("th", ""), ("inches", "in"), ("feet", "ft"), ("boxes", "box"), ("ladies", "lady"),
        ("or more", None), ("if x", None), ("apples + 3", None), ("times", None), ("(", None),
        ("a b c d e f g h i j k l", None),
    ],
)  # fmt: skip
def test_units(phrase, unit):
    assert unit_of(phrase) == unit


def test_singulars():
    nouns = ("glasses", "glass", "days", "bus", "cities", "ways", "children", "s")
    singulars = ["glass", "glass", "day", "bu", "city", "way", "child", "s"]
    assert [singular(noun) for noun in nouns] == singulars
