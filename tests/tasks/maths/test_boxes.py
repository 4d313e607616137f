r"""Boxes without braces."""

from __future__ import annotations

import pytest

from benchmark_rows import FOLDER
from satune.tasks.maths.boxes import last_box
from satune.tasks.maths.task import Maths

CASES = FOLDER.parent / "cases"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so the answer is $\boxed 2$.", "2"),
        (r"so $\boxed2$", "2"),
        (r"thus $\boxed {2}$", "2"),
        (r"thus $\boxed \frac12$.", r"\frac12"),
        (r"thus $\boxed \frac{1}{2}$.", r"\frac{1}{2}"),
        (r"thus $\boxed x+1$", "x+1"),
        (r"\(\boxed -3\)", "-3"),
        (r"\[\boxed 12,\]", "12"),
        ("So \\boxed 12 apples.\nDone", "12"),
        (r"\boxed 3 or rather $\boxed 4$", "4"),
        (r"$\boxed 5$, in \boxed form as $asked$", "5"),
        (r"$\boxed 5$ (boxed with \boxed{})", "5"),
        (r"\boxed", None),
        (r"put it in \boxed please", None),
        (r"$\boxed{5$", None),
        (r"\boxedtext 5", None),
        (r"<think>$\boxed 5$", None),
    ],
)
def test_boxes_without_braces(text, found):
    assert last_box(text) == found


@pytest.mark.parametrize("name", ["08_hendrycks_rows_without_braces.data", "hendrycks_boxed_space"])
def test_rows_with_boxes_without_braces(name):
    path = CASES / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no inputs at {path}")
    assert [p.answer for p in Maths(path).problems("all")] == ["2", r"\frac12"]
