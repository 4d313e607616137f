"""What a row of theory may claim."""

import math

import pytest

from satune.core.theory import PAPER_REMARK, TheoryRow, theory_row, theory_status

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("gain", "penalty", "largest", "status"),
    [
        (0.2, 0.1, 0.5, "positive"),
        (0.1, 0.1, 0.5, "not positive"),
        (0.0, 0.0, 0.0, "not positive"),
        (0.2, 0.0, 0.0, "positive"),
        (0.9, 0.6, 0.5, "vacuous"),
        (0.9, INF, INF, "vacuous"),
        (INF, INF, 1.0, "vacuous"),
        (0.9, NAN, 1.0, "vacuous"),
        (NAN, 0.1, 1.0, "not positive"),
        (-0.9, 0.1, 1.0, "not positive"),
    ],
)
def test_status(gain: float, penalty: float, largest: float, status: str):
    assert theory_status(gain, penalty, plug_in=False, largest_gain=largest) == status
    sampled = theory_status(gain, penalty, plug_in=True, largest_gain=largest)
    assert sampled == ("plug-in positive" if status == "positive" else status)


def test_sup_free_is_a_plug_in_and_paper_carries_its_remark():
    assert theory_row("sup-free", 0.2, 0.1, plug_in=False).status == "plug-in positive"
    assert theory_row("paper", 0.2, 0.1, plug_in=False).remark == PAPER_REMARK
    row = theory_row("cpo", 0.25, 0.125, plug_in=False)
    assert row == TheoryRow("cpo", 0.25, 0.125, "positive") and row.lower == 0.125
    assert row.to_dict() == {
        "name": "cpo",
        "gain": 0.25,
        "penalty": 0.125,
        "lower": 0.125,
        "status": "positive",
    }
