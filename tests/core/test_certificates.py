"""Evidence by hand, and what a certificate says."""

import json
import math

import pytest
import torch

from satune.core.certificates import (
    balance_evidence,
    certify,
    evidence_range,
    fresh_evidence,
    pessimistic_evidence,
)

NAN, INF = math.nan, math.inf


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_fresh_evidence_by_hand():
    # Counts may differ: 3/4 - 1/2 and 0 - 1.
    found = fresh_evidence(table([0, 1], [1, 1]), table([1, 1, 1, 0], [0, 0, 0, 0]))
    assert found.tolist() == [0.25, -1]


def test_balance_evidence_by_hand():
    # tanh(log(3)/2) = (3 - 1)/(3 + 1) = 1/2. Old: 1/2 * (1 - 1/2) = 1/4, and -1/2 * (0 - 1/2) =
    # 1/4, mean 1/4; new: u = inf gives 1 * (1 - 1/2) = 1/2.
    u = math.log(3)
    found = balance_evidence(table([1, 0]), table([u, -u]), table([1]), table([INF]))
    assert found.tolist() == pytest.approx([0.75], abs=1e-15)
    # The ends of the range: what the new team never does failed, what only it does succeeded.
    ends = balance_evidence(
        table([0, 0], [1, 1]),
        table([-INF, -INF], [-INF, -INF]),
        table([1], [0]),
        table([INF], [INF]),
    )
    assert ends.tolist() == [1, -1]


def test_pessimistic_evidence_by_hand():
    # r = 3, 1/3, inf, 0 capped at 2: (2 - 1) * 1, (1/3 - 1) * 1, (2 - 1) * 1/2, -1 * 1.
    u = math.log(3)
    found = pessimistic_evidence(table([1, 1, 0.5, 1]), table([u, -u, INF, -INF]), 2.0)
    assert found.tolist() == pytest.approx([(1 - 2 / 3 + 0.5 - 1) / 4], abs=1e-15)
    assert pessimistic_evidence(table([0, 0]), table([INF, -INF]), 2.0).tolist() == [0]
    # Rounding leaves no value outside of the range, at which the bounds would refuse it.
    for clip in (1.1, 1.3, 1.7):
        found = pessimistic_evidence(torch.ones(3, 7), torch.full((3, 7), INF), clip)
        assert certify(found, "pessimistic", 0.05, samples=(7, 0), clip=clip).high == clip - 1


def test_ranges():
    assert evidence_range("fresh") == evidence_range("balance") == (-1, 1)
    assert evidence_range("pessimistic", 1.5) == (-1, 0.5)
    for clip in (None, 0.9, INF, NAN):
        with pytest.raises(ValueError, match="clip"):
            evidence_range("pessimistic", clip)


def test_refusals():
    good, u = table([0, 1]), table([0, 0])
    for bad in (table([0, 1.01]), table([-0.01, 1]), table([NAN, 1]), torch.ones(2)):
        for call in (
            lambda bad=bad: fresh_evidence(bad, good),
            lambda bad=bad: fresh_evidence(good, bad),
            lambda bad=bad: balance_evidence(bad, u, good, u),
            lambda bad=bad: balance_evidence(good, u, bad, u),
            lambda bad=bad: pessimistic_evidence(bad, u, 2.0),
        ):
            with pytest.raises(ValueError, match="reward"):
                call()
    with pytest.raises(ValueError, match="NaN"):
        balance_evidence(good, table([0, NAN]), good, u)
    with pytest.raises(ValueError, match="an episode"):
        pessimistic_evidence(good, table([0]), 2.0)
    with pytest.raises(ValueError, match="same problems"):
        fresh_evidence(good, torch.ones(2, 2))
    with pytest.raises(ValueError, match="held_out"):
        certify(good[0], "fresh", 0.05, samples=(1, 1), held_out="train")  # pyright: ignore
    with pytest.raises(ValueError, match="method"):
        certify(good[0], "fresh", 0.05, "normal", samples=(1, 1))  # pyright: ignore
    with pytest.raises(ValueError, match="outside"):
        certify(table([1.5])[0], "fresh", 0.05, samples=(1, 1))


def test_a_certificate_says_what_it_is():
    better = certify(torch.ones(512), "fresh", 0.05 / 3, samples=(8, 4), decision=2)
    assert better.positive and better.lower == better.betting > 0.9
    assert (better.problems, better.samples, better.decision) == (512, (8, 4), 2)
    assert better.claim == (
        f"The mean reward rises by at least {math.floor(better.lower * 1000) / 1000} "
        "(error probability 0.0167) over the task's distribution of problems."
    )
    values = json.loads(json.dumps(better.to_dict()))
    assert values["claim"] == better.claim and values["samples"] == [8, 4]
    assert values["empirical_bernstein"] < values["betting"]

    same = certify(torch.zeros(512), "fresh", 0.05, samples=(8, 8), held_out="finite")
    assert not same.positive and -0.1 < same.lower < 0
    assert same.claim.startswith("The mean reward falls by at most 0.0")
    assert same.claim.endswith("over this finite set of problems, and nothing beyond it.")
    # Rounded to the safe side.
    fall = float(same.claim.split("at most ")[1].split(" ")[0])
    assert -fall <= same.lower < -fall + 1e-3

    nothing = certify(torch.zeros(1), "fresh", 0.05, "hoeffding", samples=(1, 1))
    assert nothing.lower == -1 and nothing.claim.startswith("Nothing is shown")
    assert "standard_error" not in nothing.to_dict()


def test_the_method_decides_and_the_others_stand_beside_it():
    values = torch.linspace(-0.2, 0.4, 200)
    found = {
        method: certify(values, "fresh", 0.05, method, samples=(8, 8))
        for method in ("betting", "empirical_bernstein", "hoeffding")
    }
    for method, one in found.items():
        assert one.method == method and one.lower == getattr(one, method)
        assert one.betting == found["betting"].lower and one.hoeffding == found["hoeffding"].lower
