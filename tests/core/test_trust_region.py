"""The line search and beta as state machines."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from satune.core.trust_region import LineSearch, TrustRegionSettings, adapt_beta


def test_accepts_at_once_up_to_delta():
    search = LineSearch(TrustRegionSettings(delta=0.05))
    assert search.scale == 1.0 and search.first_statistic is None
    assert search.observe(0.05) == "accept"
    assert search.scale == 1.0 and search.first_statistic == 0.05
    assert "within" in search.reason


def test_shrinks_by_the_square_root_rule():
    search = LineSearch(TrustRegionSettings(delta=0.04))
    # sqrt(.04/.16) = 1/2: next scale .475. Then sqrt(.04/.09) = 2/3.
    assert search.observe(0.16) == "shrink"
    assert search.scale == pytest.approx(0.475)
    assert search.observe(0.09) == "shrink"
    assert search.scale == pytest.approx(0.475 * 0.95 * 2 / 3)
    assert search.observe(0.039) == "accept"
    assert search.first_statistic == 0.16
    assert [scale for scale, _ in search.measured] == pytest.approx([1, 0.475, 0.475 * 1.9 / 3])


@pytest.mark.parametrize("statistic", [1e9, math.inf, math.nan])
def test_never_shrinks_below_a_quarter_at_once(statistic):
    search = LineSearch(TrustRegionSettings())
    assert search.observe(statistic) == "shrink" and search.scale == 0.25


@given(st.floats(1e-6, 1), st.floats(1.0001, 1e9), st.floats(1.0001, 1e9))
def test_beyond_what_is_foregone_the_size_does_not_matter(delta, one, other):
    settings = TrustRegionSettings(delta=delta)
    outcomes = []
    for times in (one, other):
        search = LineSearch(settings)
        statistic = times * search.foregone
        assert search.observe(statistic, whole=False) == "shrink"
        outcomes.append((search.scale, search.at_least, adapt_beta(1.0, 1.0, statistic, delta)))
    assert outcomes == [(0.25, [1.0], 2.0)] * 2
    # Below it the size does matter, hence has to be known.
    search = LineSearch(settings)
    search.observe(0.99 * search.foregone)
    assert search.scale > 0.25 and search.at_least == []
    with pytest.raises(AssertionError, match="measured wholly"):
        search.observe(0.99 * search.foregone, whole=False)


def test_the_last_candidate_and_one_without_a_region_are_measured_wholly():
    search = LineSearch(TrustRegionSettings(backtracks=1))
    assert search.foregone < math.inf
    search.observe(1e9)
    assert search.foregone == math.inf
    assert LineSearch(TrustRegionSettings(enabled=False)).foregone == math.inf


@pytest.mark.parametrize("backtracks", [0, 1, 5])
def test_reverts_when_the_budget_ends(backtracks):
    search = LineSearch(TrustRegionSettings(backtracks=backtracks))
    assert [search.observe(1.0) for _ in range(backtracks)] == ["shrink"] * backtracks
    assert search.observe(1.0) == "revert"
    assert search.scale == 0.0
    assert f"after {backtracks} backtrack" in search.reason
    with pytest.raises(AssertionError):
        search.observe(0.0)


def test_switched_off():
    assert LineSearch(TrustRegionSettings(enabled=False)).observe(1e9) == "accept"
    for broken in (math.nan, math.inf):
        search = LineSearch(TrustRegionSettings(enabled=False))
        assert search.observe(broken) == "revert" and search.scale == 0.0
        assert "not finite" in search.reason


@given(
    statistics=st.lists(
        st.one_of(st.floats(0, 100), st.sampled_from([math.nan, math.inf])), min_size=6, max_size=6
    ),
    delta=st.floats(1e-6, 10),
)
def test_ends_within_delta_or_reverted(statistics, delta):
    search = LineSearch(TrustRegionSettings(delta=delta))
    for statistic in statistics:
        before = search.scale
        decision = search.observe(statistic)
        if decision != "shrink":
            break
        assert before / 4 <= search.scale < before
    assert decision in ("accept", "revert")
    if decision == "accept":
        assert statistic <= delta and search.scale == search.measured[-1][0] > 0
    else:
        assert search.scale == 0.0 and len(search.measured) == 6


@given(curvature=st.floats(1e-3, 1e3), delta=st.floats(1e-3, 1))
def test_a_quadratic_divergence_ends_close_below_delta(curvature, delta):
    # KL = curvature s^2: s/4 is taken only if KL/16 > .9025 delta, the root lands at .9025 delta.
    search = LineSearch(TrustRegionSettings(delta=delta, backtracks=20))
    while search.observe(curvature * search.scale**2) == "shrink":
        pass
    assert search.decision == "accept"
    if curvature > delta:
        final = search.measured[-1][1]
        assert 0.9025 * delta * (1 - 1e-9) < final <= delta
        quarters = max(0.0, math.log(curvature / delta, 16))
        assert len(search.measured) - 1 <= math.ceil(quarters) + 1


def test_beta():
    # Doubled above 1.5 delta, halved below delta/1.5, unchanged between and at both edges.
    delta = 0.75
    assert adapt_beta(1.0, 1.0, 1.126, delta) == 2.0
    assert adapt_beta(1.0, 1.0, 1.125, delta) == 1.0
    assert adapt_beta(1.0, 1.0, 0.5, delta) == 1.0
    assert adapt_beta(1.0, 1.0, 0.499, delta) == 0.5
    for broken in (math.nan, math.inf):
        assert adapt_beta(1.0, 1.0, broken, delta) == 2.0
    assert adapt_beta(50.0, 1.0, 2.0, delta) == 64.0
    assert adapt_beta(0.02, 1.0, 0.0, delta) == 1 / 64
    assert adapt_beta(0.0, 0.0, 9.0, delta) == 0.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("delta", 0.0),
        ("delta", math.nan),
        ("quantile", 0.0),
        ("quantile", 1.1),
        ("unit", "word"),
        ("beta", -1.0),
        ("beta", math.inf),
        ("backtracks", -1),
    ],
)
def test_settings_name_the_key(field, value):
    with pytest.raises(ValueError, match=f"trust_region.{field}"):
        TrustRegionSettings(**{field: value})
