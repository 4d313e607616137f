"""Quantiles, DKW, Clopper-Pearson and the statistics of a step, by hand."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from satune.core.divergence import (
    clopper_pearson,
    divergence_statistics,
    level_shifted_quantile,
    weighted_quantile,
)

NAN, INF = math.nan, math.inf


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weighted_quantile_hand_computed():
    # Sorted 1, 2, 5 with weights 2, 1, 1: cumulative 2, 3, 4 of 4.
    values, weights = numbers(5, 1, 2), numbers(1, 2, 1)
    found = [weighted_quantile(values, weights, q) for q in (0, 0.5, 0.51, 0.75, 0.76, 1)]
    assert found == [1, 1, 2, 2, 5, 5]


def test_quantile_is_the_order_statistic_despite_rounding():
    # .07 * 100 = 7.000000000000001 in floating point: still the 7th of 100.
    values = torch.arange(1, 101).double()
    for level in range(1, 101):
        assert weighted_quantile(values, torch.ones(100), level / 100) == level


def test_quantile_at_its_ends():
    values = numbers(1, INF, 3)
    assert weighted_quantile(values, numbers(1, 0, 1), 1.0) == 3
    assert weighted_quantile(values, numbers(1, 1e-15, 1), 1.0) == INF
    assert weighted_quantile(values, numbers(0, 1, 1), 0.0) == 3
    assert math.isnan(weighted_quantile(numbers(1, NAN), numbers(1, 0), 0.5))
    assert math.isnan(weighted_quantile(numbers(1, 2), numbers(1, NAN), 0.5))
    assert math.isnan(weighted_quantile(numbers(1, 2), numbers(1, INF), 0.5))
    assert math.isnan(weighted_quantile(numbers(), numbers(), 0.5))
    assert math.isnan(weighted_quantile(numbers(1, 2), numbers(0, 0), 0.5))
    with pytest.raises(ValueError, match="negative"):
        weighted_quantile(numbers(1, 2), numbers(1, -1), 0.5)
    with pytest.raises(ValueError, match="level"):
        weighted_quantile(numbers(1, 2), numbers(1, 1), 1.5)


@given(
    pairs=st.lists(st.tuples(st.floats(-9, 9), st.floats(0.01, 9)), min_size=1, max_size=20),
    levels=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_quantile_rises_with_its_level_and_is_one_of_the_values(pairs, levels):
    values, weights = numbers(*(p[0] for p in pairs)), numbers(*(p[1] for p in pairs))
    low, high = (weighted_quantile(values, weights, level) for level in sorted(levels))
    assert low <= high and {low, high} <= set(values.tolist())
    share = weights[values <= low].sum() / weights.sum()
    assert share >= min(levels) - 1e-9


def test_level_shifted_quantile():
    # N = 600, eta = .05: epsilon = sqrt(log 20 / 1200) = .049965, rank ceil(.999965 * 600) = 600.
    # a = .1: rank ceil(.949965 * 600 = 569.98) = 570.
    values = torch.randperm(600, generator=torch.Generator().manual_seed(0)).double() + 1
    assert level_shifted_quantile(values, 0.05) == (600.0, 600)
    assert level_shifted_quantile(values, 0.1) == (570.0, 600)
    assert level_shifted_quantile(values[:599], 0.05) == (INF, 599)
    assert level_shifted_quantile(torch.zeros(14_979), 0.01) == (0.0, 14_979)
    assert level_shifted_quantile(torch.zeros(14_978), 0.01) == (INF, 14_978)
    assert level_shifted_quantile(numbers(), 1.0) == (INF, 0)
    assert math.isnan(level_shifted_quantile(numbers(1, NAN), 1.0)[0])
    with pytest.raises(ValueError, match="eta"):
        level_shifted_quantile(values, 0.05, eta=0.6)


def test_clopper_pearson():
    # No violation in n: (1 - p)^n = .05, the "rule of three".
    assert clopper_pearson(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59), rel=1e-12)
    assert clopper_pearson(7, 7) == clopper_pearson(0, 0) == 1.0
    for k, n, confidence in ((1, 10, 0.95), (30, 96, 0.9), (500, 512, 0.99)):
        upper = clopper_pearson(k, n, confidence)
        # Its definition: at the bound the observed tail has probability 1 - confidence.
        assert binom.cdf(k, n, upper) == pytest.approx(1 - confidence, rel=1e-9)
        assert upper == pytest.approx(beta.ppf(confidence, k + 1, n - k), rel=1e-12)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        clopper_pearson(3, 2)
    with pytest.raises(ValueError, match="confidence"):
        clopper_pearson(1, 2, 1.0)


def scene(**changes):
    """Problem 9: episodes 0 (turns .01 + .02 and .04) and 1 (turn .03). Problem 4: episode 2 (turn
    .10) and episode 3, in which the agent said nothing. Reverse KL is twice as large."""
    kl = numbers(0.01, 0.02, 0.04, 0.03, 0.10)
    fields = {
        "kl_T": kl,
        "reverse_T": 2 * kl,
        "episode_T": torch.tensor([0, 0, 0, 1, 2]),
        "turn_T": torch.tensor([0, 0, 1, 0, 0]),
        "weights_E": torch.ones(4),
        "problem_E": torch.tensor([9, 9, 4, 4]),
        "delta": 0.05,
        "quantile": 0.8,
    }
    return divergence_statistics(**(fields | changes))


def test_token_statistics():
    got = scene()
    assert got.mean == pytest.approx(0.04) and got.max == 0.10
    # The 4th of .01, .02, .03, .04, .10.
    assert got.quantile == 0.04 and got.reverse_quantile == 0.08
    # Trajectory sums: problem 9 (.07, .03), problem 4 (.10, 0): means .05 and .05.
    assert got.trajectory == pytest.approx({"forward": 0.05, "reverse": 0.10})
    # Only problem 4 has a state above .05; Clopper-Pearson for 1 of 2: (1-p)^2 + 2p(1-p) = .05.
    assert got.violation_rate == 0.5 and got.violation_share == pytest.approx(1 / 5)
    assert got.violation_ucb == pytest.approx(math.sqrt(0.95))
    assert got.level_shifted_quantile == INF
    assert (got.states, got.problems) == (5, 2)


def test_units():
    # Turns .03, .04, .03, .10; the first two belong to episode 0, turn numbers start anew.
    turns = scene(unit="turn", quantile=0.75)
    assert turns.quantile == pytest.approx(0.04) and turns.violation_rate == 0.5
    # Episodes 0, .03, .07, .10: problem 9 exceeds .05 as well.
    whole = scene(unit="trajectory", quantile=0.75)
    assert whole.quantile == pytest.approx(0.07) and whole.violation_rate == 1.0
    assert whole.violation_ucb == 1.0
    # One of four turns, two of four episodes.
    assert (turns.violation_share, whole.violation_share) == (1 / 4, 1 / 2)
    assert turns.max == whole.max == 0.10 and turns.mean == whole.mean


def test_turns_numbered_throughout_give_the_same():
    assert scene(unit="turn", turn_T=torch.tensor([5, 5, 2, 8, 1])) == scene(unit="turn")


def test_weights():
    # w = (1, 2, 0, 5): mean (.07 + 2 * .03)/(3 + 2) = .026; the cumulative weights of .01, .02,
    # .03, .04 are 1, 2, 4, 5; trajectories (.07 + .06)/2 and (0 + 0)/2.
    got = scene(weights_E=numbers(1, 2, 0, 5))
    assert got.mean == pytest.approx(0.026) and got.quantile == 0.03
    assert got.trajectory["forward"] == pytest.approx((0.065 + 0) / 2)
    assert got.violation_rate == 0.5 and got.violation_share == 0.0  # .10 has weight 0
    assert scene(weights_E=numbers(1, 2, 0, 5), delta=0.025).violation_share == pytest.approx(3 / 5)


def test_a_nan_is_never_hidden():
    kl = numbers(0.01, NAN, 0.04, 0.03, 0.10)
    for unit in ("token", "turn", "trajectory"):
        got = scene(kl_T=kl, unit=unit).to_dict()
        broken = {key for key, value in got.items() if isinstance(value, float) and value != value}
        assert broken == {
            "mean",
            "quantile",
            "max",
            "violation_share",
            "violation_rate",
            "violation_ucb",
            "level_shifted_quantile",
        }
        assert math.isnan(got["trajectory"]["forward"])
        assert got["trajectory"]["reverse"] == pytest.approx(0.10)
        assert math.isnan(scene(reverse_T=kl, unit=unit).to_dict()["reverse_quantile"])


def test_infinite_divergence():
    got = scene(kl_T=numbers(0.01, 0.02, 0.04, 0.03, INF))
    assert got.quantile == 0.04 and got.max == got.mean == INF
    assert got.trajectory["forward"] == INF and got.violation_rate == 0.5


def test_without_states():
    none = torch.zeros(0, dtype=torch.long)
    got = scene(kl_T=numbers(), reverse_T=None, episode_T=none, turn_T=none, unit="trajectory")
    assert math.isnan(got.quantile) and math.isnan(got.max) and math.isnan(got.mean)
    assert math.isnan(got.trajectory["forward"]) and math.isnan(got.violation_ucb)
    assert (got.states, got.problems) == (0, 2)


def test_to_dict_leaves_out_what_was_not_measured():
    assert "reverse_quantile" in scene().to_dict()
    found = scene(reverse_T=None).to_dict()
    assert "reverse_quantile" not in found and set(found["trajectory"]) == {"forward"}
    assert json.loads(json.dumps(found))["states"] == 5
    assert all(type(value) in (float, int, dict) for value in found.values())


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_tokens_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    kl = torch.rand(30, dtype=torch.float64, generator=generator)
    episode = torch.randint(6, (30,), generator=generator)
    turn = torch.randint(3, (30,), generator=generator)
    order = torch.randperm(30, generator=generator)
    for unit in ("token", "turn", "trajectory"):
        shared = {
            "weights_E": torch.rand(6, generator=generator),
            "problem_E": torch.arange(6) // 2,
            "unit": unit,
        }
        left = scene(kl_T=kl, reverse_T=2 * kl, episode_T=episode, turn_T=turn, **shared).to_dict()
        kl_2, episode_2, turn_2 = kl[order], episode[order], turn[order]
        right = scene(
            kl_T=kl_2, reverse_T=2 * kl_2, episode_T=episode_2, turn_T=turn_2, **shared
        ).to_dict()
        assert left.pop("trajectory") == pytest.approx(right.pop("trajectory"))
        assert left == pytest.approx(right)
        assert left["quantile"] <= (left["max"] if unit == "token" else INF)


def test_bad_input():
    with pytest.raises(ValueError, match="a token"):
        scene(turn_T=torch.zeros(4).long())
    with pytest.raises(ValueError, match="an episode"):
        scene(problem_E=torch.zeros(3).long())
    with pytest.raises(ValueError, match="quantile"):
        scene(quantile=0.0)
    with pytest.raises(ValueError, match="confidence"):
        scene(confidence=0.2)
