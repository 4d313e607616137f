"""Bounds on a mean against an independent reference, by hand, and by their invariants."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.core.confidence import (
    METHODS,
    Spending,
    betting_lower_bound,
    empirical_bernstein_lower_bound,
    hoeffding_lower_bound,
    lower_bound,
    lower_bounds,
)
from yardstick import at_most

NAN = math.nan
unit = st.floats(0, 1, width=32)
samples = st.lists(unit, min_size=1, max_size=40)
alphas = st.floats(1e-4, 0.5)
methods = st.sampled_from(sorted(METHODS))


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reference_capital(values: list[float], m: float, alpha: float) -> list[float]:
    """log K_t(m), written down from the definition: every sum is formed anew."""
    count, total, path = len(values), 0.0, []
    for s in range(1, count + 1):
        variance = 0.25
        if s > 1:
            means = [(0.5 + math.fsum(values[:j])) / (j + 1) for j in range(1, s)]
            squares = [(y - mu) ** 2 for y, mu in zip(values, means, strict=False)]
            variance = (0.25 + math.fsum(squares)) / s
        rate = math.sqrt(2 * math.log(1 / alpha) / (count * variance))
        if m > 0:
            rate = min(rate, 0.75 / m)
        total += math.log(1 + rate * (values[s - 1] - m))
        path.append(total)
    return path


def test_the_reference_by_hand():
    # alpha = e^-2 and N = 4 make 2 log(1/alpha)/N = 1. Y = 1, 0 at m = 1/4:
    # sigma^2_0 = 1/4, lambda_1 = min(2, 3) = 2, factor 1 + 2 * 3/4 = 2.5.
    # mu_1 = 3/4, sigma^2_1 = (1/4 + 1/16)/2 = 5/32, lambda_2 = min(sqrt(32/5) = 2.53, 3),
    # factor 1 - sqrt(32/5)/4.
    found = [math.exp(log) for log in reference_capital([1, 0, 0.5, 0.5], 0.25, math.exp(-2))[:2]]
    assert found == pytest.approx([2.5, 2.5 * (1 - math.sqrt(32 / 5) / 4)], abs=1e-12)
    # The cap at m = 1/2: lambda = min(2, 1.5), factor 1 + 1.5/2; at m = 0 there is no cap.
    for mean, capital in ((0.5, 1.75), (0.0, 3.0)):
        found = reference_capital([1, 0, 0, 0], mean, math.exp(-2))[0]
        assert math.exp(found) == pytest.approx(capital)


@given(values=samples, alpha=alphas)
def test_betting_bound_brackets_the_reference(values, alpha):
    """At the bound the capital has reached 1/alpha, 1e-9 above it it has not."""
    bound = float(betting_lower_bound(numbers(*values)[None], alpha)[0])
    target = math.log(1 / alpha)
    if bound > 0:
        assert max(reference_capital(values, bound, alpha)) >= target - 1e-12
    assert max(reference_capital(values, bound + 1e-9, alpha)) < target


@given(
    values=samples,
    method=st.sampled_from(["empirical_bernstein", "hoeffding"]),
    pair=st.tuples(alphas, alphas),
)
def test_simple_bounds_rise_with_alpha_and_stay_below_the_mean(values, method, pair):
    low, high = (lower_bound(numbers(*values), 0, 1, alpha, method) for alpha in sorted(pair))
    assert low <= high + 1e-12
    assert 0 <= high <= math.fsum(values) / len(values) + 1e-12


@given(values=samples, alpha=alphas)
def test_betting_bound_lies_below_the_largest_value(values, alpha):
    # log(1 + x) <= x: capital at m needs sum lambda_s (Y_s - m) > 0, so m < max Y.
    bound = float(betting_lower_bound(numbers(*values)[None], alpha)[0])
    assert bound == 0 or bound < max(values)


def test_betting_bound_rises_with_alpha_on_draws_but_not_on_every_row():
    generator = torch.Generator().manual_seed(2)
    rows_RN = (torch.rand(200, 128, generator=generator) < 0.6).double()
    found = [betting_lower_bound(rows_RN, alpha) for alpha in (1e-4, 1e-3, 0.01, 0.05, 0.2)]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(found))
    # The rates depend on alpha too. Losses under a low variance hit the cap and stay as they are;
    # the gains after them are below it and grow as alpha falls, faster than the target here.
    row = numbers(*[0.2272] * 19, *[1] * 38)[None]
    wide, tight = (float(betting_lower_bound(row, alpha)[0]) for alpha in (0.1311, 0.1049))
    assert tight > wide + 1e-3


def test_betting_bound_can_lie_above_the_mean_of_a_row_that_falls():
    # For draws in the order drawn that is as rare as alpha says; the best time to look counts.
    falling = numbers(*[1] * 64, *[0] * 64)
    assert lower_bound(falling, 0, 1, 0.05) > 0.8
    assert lower_bound(falling.flip(0), 0, 1, 0.05) < 0.5


@given(values=samples, method=methods, alpha=alphas, low=st.floats(-3, 3), width=st.floats(0.1, 5))
def test_bounds_move_with_an_affine_map_of_the_range(values, method, alpha, low, width):
    plain = lower_bound(numbers(*values), 0, 1, alpha, method)
    moved = low + width * numbers(*values)
    found = lower_bound(moved.clamp(low, low + width), low, low + width, alpha, method)
    assert found == pytest.approx(low + width * plain, abs=1e-9 * width)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_degenerate_values(method):
    assert lower_bound(torch.zeros(64), 0, 1, 0.05, method) == 0
    ones = lower_bound(torch.ones(64), 0, 1, 0.05, method)
    assert 0.7 < ones < 1
    single = lower_bound(torch.ones(1), 0, 1, 0.05, method)
    assert 0 <= single < 1
    assert lower_bound(torch.full((64,), -1.0), -1, 1, 0.05, method) == -1


def test_single_value_by_hand():
    # N = 1, Y = 1, alpha = 1/20: K(m) = 1 + lambda (1 - m), lambda = min(sqrt(8 log 20), .75/m).
    # At m = 0 it is 1 + 4.9 = 5.9 < 20: the bound is 0. At alpha = 1/2: sqrt(8 log 2) = 2.355;
    # capped, 1 + .75 (1/m - 1) = 2 at m = 3/7, where .75/m = 1.75 < 2.355. Hoeffding:
    # 1 - sqrt(log 2 / 2) = .411; empirical Bernstein knows nothing from one value.
    assert float(betting_lower_bound(numbers(1)[None], 0.05)[0]) == 0
    assert float(betting_lower_bound(numbers(1)[None], 0.5)[0]) == pytest.approx(3 / 7, abs=1e-9)
    assert float(hoeffding_lower_bound(numbers(1)[None], 0.5)[0]) == pytest.approx(
        1 - math.sqrt(math.log(2) / 2), abs=1e-12
    )
    assert float(empirical_bernstein_lower_bound(numbers(1)[None], 0.5)[0]) == 0


def test_empirical_bernstein_by_hand():
    # 100 values, half 1/4 and half 3/4: V = 100/16/99; alpha = 2/e^2 makes log(2/alpha) = 2.
    values = numbers(0.25, 0.75).repeat(50)
    expected = 0.5 - math.sqrt(2 * (100 / 16 / 99) * 2 / 100) - 14 / (3 * 99)
    found = empirical_bernstein_lower_bound(values[None], 2 / math.e**2)
    assert float(found[0]) == pytest.approx(expected, abs=1e-12)


def test_many_samples_at_once_equal_one_by_one():
    values_RN = torch.rand(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in METHODS:
        single = [lower_bound(row, 0, 1, 0.05, method) for row in values_RN]
        found = lower_bounds(values_RN, 0, 1, 0.05, method).tolist()
        assert found == pytest.approx(single, abs=1e-12)


def test_speed():
    values_N = torch.rand(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with at_most(20):  # 1.2 ms a bound where nothing else runs
        for _ in range(50):
            lower_bound(values_N, 0, 1, 0.05)


def test_refusals():
    for values in (numbers(), numbers(0.5, NAN), numbers(0.5, 1.0001), numbers(-1e-9)):
        with pytest.raises(ValueError, match="lower_bound"):
            lower_bound(values, 0, 1, 0.05)
    for alpha in (0, 1, NAN):
        with pytest.raises(ValueError, match="alpha"):
            lower_bound(numbers(0.5), 0, 1, alpha)
    with pytest.raises(ValueError, match="method"):
        lower_bound(numbers(0.5), 0, 1, 0.05, "normal")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="range"):
        lower_bound(numbers(0.5), 1, 1, 0.05)
    with pytest.raises(ValueError, match="one row"):
        lower_bound(numbers(0.5)[None], 0, 1, 0.05)


def test_declared_decisions_share_evenly_and_end():
    spending = Spending(0.06, decisions=3)
    assert [spending.next() for _ in range(3)] == [0.02] * 3
    assert spending.exhausted and spending.spent == pytest.approx(0.06, abs=1e-15)
    with pytest.raises(ValueError, match="declared"):
        spending.next()
    assert spending.used == 3


def test_open_sequence_never_spends_more_than_its_confidence():
    spending = Spending(0.05)
    first = [spending.next() for _ in range(3)]
    # 6/pi^2 = .6079 of it goes to the first test, a quarter and a ninth of that to the next two.
    assert first == pytest.approx([0.05 * 0.6079271 / k**2 for k in (1, 2, 3)], rel=1e-6)
    spending = Spending(0.05, used=100_000)
    assert not spending.exhausted
    # The tail beyond k is about 6/(pi^2 k) of the confidence.
    assert 0.05 * (1 - 1e-5) < spending.spent < 0.05


@given(decisions=st.none() | st.integers(1, 9), used=st.integers(0, 9))
def test_spending_goes_on_where_it_was_saved(decisions, used):
    first = Spending(0.05, decisions, min(used, decisions or used))
    again = Spending.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again == first
    if not first.exhausted:
        assert again.next() == first.next()


def test_spending_refuses_what_is_out_of_range():
    for values in ((0, None, 0), (1, None, 0), (0.05, 0, 0), (0.05, 2, 3), (0.05, None, -1)):
        with pytest.raises(ValueError):
            Spending(*values)
