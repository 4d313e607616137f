"""The discounted bounds of THEORY §2 and §3 by hand, at their ends, and as invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from satune.core import theory, variation
from satune.lab import bounds

NAN, INF = math.nan, math.inf
GAMMA = st.floats(0, 0.9999)
TV = st.floats(0, 1)
KL = st.floats(0, 50) | st.just(INF)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: float | list[float], relative: float = 1e-13) -> bool:
    return bool(torch.allclose(found, bounds.as_float64(expected), rtol=relative, atol=0))


# Total variation


def test_tv_from_kl_by_hand():
    # KL .02: sqrt(.01) = .1 < sqrt(1 - exp(-.02)) = .1407. KL 2: sqrt(1) = 1 > sqrt(1 - exp(-2)).
    assert close(variation.tv_from_kl(0.02), 0.1)
    assert close(variation.tv_from_kl(2.0), math.sqrt(1 - math.exp(-2)))
    assert variation.tv_from_kl(numbers(0, INF)).tolist() == [0, 1]
    assert variation.tv_pinsker(numbers(0, INF)).tolist() == [0, INF]
    # 1 - exp(-KL) computed as written would be 0 here.
    assert close(variation.tv_bretagnolle_huber(1e-20), 1e-10)
    assert math.isnan(variation.tv_from_kl(NAN))


def test_the_two_forms_cross_near_1_594():
    pair = (variation.tv_pinsker, variation.tv_bretagnolle_huber)
    forms = [tuple(form(kl) for form in pair) for kl in (1.593, 1.594)]
    assert forms[0][0] < forms[0][1] and forms[1][0] > forms[1][1]


@given(p=st.floats(0.0, 1), q=st.floats(0.0, 1))
def test_tv_of_two_coins_is_bounded_in_either_direction(p: float, q: float):
    pair, other = numbers(p, 1 - p), numbers(q, 1 - q)
    for old, new in ((pair, other), (other, pair)):
        ratio = torch.where(old > 0, old * (old.log() - new.log()), 0.0)
        kl = ratio.sum().clamp(min=0)
        assert abs(p - q) <= variation.tv_from_kl(kl) + 1e-7 * abs(p - q) + 1e-8


def test_joint_tv_by_hand():
    # 1 - .9 * .8 = .28; an agent that surely moves makes it 1.
    assert close(variation.joint_tv(numbers(0.1, 0.2)), 0.28)
    assert variation.joint_tv(numbers(1, 0.5)) == 1 and variation.joint_tv(numbers(0, 0)) == 0
    assert close(variation.joint_tv(numbers(1e-18, 1e-18)), 2e-18)


def test_mean_tv_from_a_violation_rate():
    # (1 - .1) * sqrt(.01) + .1 = .19
    assert close(bounds.mean_tv_from_violations(0.02, 0.1), 0.19)
    assert bounds.mean_tv_from_violations(INF, 0.3) == 1
    assert bounds.mean_tv_from_violations(0.0, 0.3) == 0.3
    upper = float(beta.ppf(0.95, 3, 98))
    assert close(bounds.mean_tv_upper(0.02, 2, 100), 0.9 * upper + 0.1, 1e-9)
    assert bounds.mean_tv_upper(0.02, 0, 0) == 1


# Occupancies and penalties


def test_occupancy_shift_by_hand():
    # gamma .5: 2 * .5/.5 * .1 = .2; 2 * .5 * .2/(1 - .5 * .8) = 1/3.
    assert close(bounds.occupancy_shift_mean(0.5, 0.1), 0.2)
    assert close(bounds.occupancy_shift_sup(0.5, 0.2), 1 / 3)
    assert close(bounds.occupancy_shift(0.5, numbers(0.1, 0.2), 0.2), [0.2, 1 / 3])
    # gamma .9, TV .5: 2 * 9 * .5 = 9 is no bound at all; 1.8 * .5/.55 is.
    assert close(bounds.occupancy_shift(0.9, 0.5, 0.5), 0.9 / 0.55)


@given(gamma=GAMMA, tv=TV)
def test_the_saturating_shift_never_exceeds_2_gamma(gamma: float, tv: float):
    assert bounds.occupancy_shift_sup(gamma, tv) <= 2 * gamma * (1 + 1e-15)


def test_gamma_next_to_1_keeps_its_digits():
    # g = 1 - 2^-50, a = 2^-50: 2 g a/(2^-50 + g 2^-50) = 2g/(1 + g), which is 1 to 16 digits.
    tiny = 2.0**-50
    assert close(bounds.occupancy_shift_sup(1 - tiny, tiny), 1.0, 1e-15)


def test_penalties_by_hand():
    # gamma .5: 1/(1-gamma)^2 = 4. TV of KL .02 is .1.
    found = bounds.step_penalties(
        0.5, a_max=3.0, span=4.0, sup_kl=0.02, sup_tv=0.1, mean_tv=0.05, max_gain=0.2
    )
    expected = {
        "paper": 2 * 0.5 * 3 * 0.1 * 4,  # 1.2
        "trpo": 4 * 0.5 * 3 * 0.01 * 4,  # .24 = 2 gamma A delta/(1-gamma)^2
        "span": 2 * 0.5 * 4 * 0.1 * 0.05 * 4,  # .08
        "cpo": 2 * 0.5 * 0.2 * 0.05 * 4,  # .04
        "saturating": 4 * 0.1 * (2 * 0.5 * 0.1 / 0.55) / 0.5,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert close(found[name], value), name
    assert close(bounds.least_penalty(found), 0.04)
    assert close(found["trpo"], 2 * 0.5 * 3 * 0.02 * 4)
    # The paper's form is never chosen, even where it is the least.
    assert bounds.least_penalty({"paper": numbers(0), "trpo": numbers(1)}) == 1


def test_infinite_kl_is_the_trivial_bound_and_zero_kl_is_none():
    tv = variation.tv_from_kl(numbers(INF, 0))
    found = bounds.step_penalties(
        0.5, a_max=3.0, span=4.0, sup_kl=numbers(INF, 0), sup_tv=tv, mean_tv=tv, max_gain=0.2
    )
    for name, value in found.items():
        assert value[1] == 0 and math.isfinite(value[0]), name
    # 2 gamma Sp/(1-gamma): no step can shift more than that.
    assert close(found["saturating"][0], 8.0)
    assert theory.penalty_paper(0.5, 0.0, INF) == 0
    naive = bounds.penalty_naive(0.5, 3.0, numbers(INF, 0.02))
    assert math.isfinite(naive)


# Below 1e-6 the products of both leave the numbers that have all their digits.
@given(gamma=st.floats(0.5, 0.9999), kl=KL, a_max=st.just(0.0) | st.floats(1e-6, 100))
def test_the_paper_form_eats_the_largest_gain_from_gamma_one_half(gamma, kl, a_max):
    # L <= 2 A_max TV/(1-gamma), because E_old A = 0.
    gain = 2 * a_max * variation.tv_from_kl(kl) / (1 - gamma)
    assert gain <= theory.penalty_paper(gamma, a_max, kl) * (1 + 1e-12)


@given(
    gamma=GAMMA, sup_tv=TV, mean_share=st.floats(0, 1), gain_share=st.floats(0, 1), a_max=st.just(1)
)
def test_the_forms_keep_their_order(gamma, sup_tv, mean_share, gain_share, a_max):
    span, mean_tv = 2.0 * a_max, sup_tv * mean_share
    found = bounds.step_penalties(
        gamma,
        a_max=a_max,
        span=span,
        sup_kl=2 * sup_tv**2,
        sup_tv=sup_tv,
        mean_tv=mean_tv,
        max_gain=gain_share * span * sup_tv,
    )
    slack = 1 + 1e-12
    assert found["cpo"] <= found["span"] * slack + 1e-300
    assert found["span"] <= found["trpo"] * slack + 1e-300
    assert found["saturating"] <= found["trpo"] * slack + 1e-300
    assert found["saturating"] <= 2 * gamma * bounds.return_change(gamma, span, sup_tv) * slack


def test_return_change_and_bias_by_hand():
    assert close(bounds.return_change(0.75, 2.0, 0.1), 0.8)  # 2 * .1/.25
    assert close(bounds.bias_cost(0.75, 0.3), 1.2)
    assert close(bounds.bias_cost_centred(0.75, 0.3, 0.1), 0.24)  # 2 * .1 * 1.2


# Stages


def test_stage_sums_by_hand():
    assert close(bounds.stage_lower(numbers(0.3, 0.2), numbers(0.1, 0.5)), -0.1, 1e-12)
    # gamma .5: 2 gamma/(1-gamma)^2 = 4. Three agents of TV .1 and max|g| 1:
    # fresh 4 * .1 * 3 = 1.2, stale 4 * .1 * (1 + 2 + 3) = 2.4: n and n(n+1)/2.
    gains, tv = numbers(1, 1, 1), numbers(0.1, 0.1, 0.1)
    assert close(bounds.penalty_fresh(0.5, gains, tv), 1.2)
    assert close(bounds.penalty_stale(0.5, gains, tv), 2.4)
    # An order in which the loud agent comes last costs more: 4 (1 * .1 + 3 * .3) = 4.
    assert close(bounds.penalty_stale(0.5, numbers(1, 3), numbers(0.1, 0.2)), 4.0)


def test_stale_occupancy_shift_by_hand():
    # gamma .5: 2 gamma/(1-gamma) = 2; KL .02 is TV .1, KL .08 is TV .2.
    found = bounds.stale_occupancy_shift(0.5, numbers(0.02, 0.08, 0.5))
    assert close(found, [0, 0.2, 0.6])
    # sqrt(2) gamma/(1-gamma) sum sqrt(delta), as THEORY §3 writes it.
    assert close(found[2], math.sqrt(2) * (math.sqrt(0.02) + math.sqrt(0.08)))
    assert bounds.stale_occupancy_shift(0.9, numbers(INF, 1)).tolist() == [0, 2]


def test_naive_penalty_by_hand():
    # gamma .5, A 1, KL .02 each, TV .1: 2 * .5 * .04 * 4 = .16, but 1 - .9^2 = .19 > TV(.04) =
    # .1414, so the first term stays; interaction (1.2^2 - 1 - .4)/.5 = .08.
    assert close(bounds.penalty_naive(0.5, 1.0, numbers(0.02, 0.02)), 0.24, 1e-12)
    # One agent: no interaction.
    assert close(
        bounds.penalty_naive(0.5, 1.0, numbers(0.02)), float(bounds.penalty_trpo(0.5, 1.0, 0.1))
    )


def test_the_interaction_of_tiny_steps_does_not_cancel():
    # prod(1 + 2a) - 1 - 4a = 4a^2 for two agents: 4e-24, far below the rounding of 1.
    tiny = numbers(1e-12, 1e-12)
    found = bounds.penalty_naive(0.0, 1.0, 2 * tiny**2, tiny)
    assert close(found, 4e-24, 1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_the_interaction_is_the_expanded_product(tv: list[float]):
    found = float(bounds.penalty_naive(0.0, 1.0, numbers(*tv), numbers(*tv)))
    expected = math.prod(1 + 2 * a for a in tv) - 1 - 2 * sum(tv)
    assert abs(found - expected) <= 1e-13 * (1 + expected)
    assert found >= 0


# Predictions and rates


def test_predicted_gain_and_its_best_delta():
    # 2 sqrt(.09) - 5 * .09 = .15; best at (2/10)^2 = .04 with 4/20 = .2.
    assert close(bounds.predicted_gain(2.0, 5.0, 0.09), 0.15, 1e-12)
    assert close(bounds.best_delta(2.0, 5.0), 0.04)
    assert close(bounds.predicted_gain(2.0, 5.0, 0.04), 0.2)
    assert bounds.best_delta(numbers(2, 0, 0), numbers(0, 1, 0)).tolist() == [INF, 0, 0]
    ends = bounds.predicted_gain(2.0, numbers(1, 0, 1), numbers(INF, INF, 0))
    assert ends.tolist() == [-INF, INF, 0]
    assert bounds.predicted_gain(0.0, 0.0, INF) == 0


def test_kappa_is_the_slope_of_a_natural_gradient_step():
    # h = (1, 2), F = diag(2, 4): h' F^-1 h = .5 + 1 = 1.5, kappa = sqrt(3).
    kappa = bounds.natural_gradient_kappa(numbers(1, 2), torch.diag(numbers(2, 4)))
    assert close(kappa, math.sqrt(3))
    # The step theta = sqrt(2 delta/1.5) F^-1 h has KL 1/2 theta' F theta = delta, and h' theta
    # = sqrt(2 delta * 1.5) = kappa sqrt(delta).
    delta = 0.01
    step = math.sqrt(2 * delta / 1.5) * numbers(0.5, 0.5)
    assert close((step * numbers(2, 4) * step).sum() / 2, delta)
    assert close((step * numbers(1, 2)).sum(), float(bounds.predicted_gain(kappa, 0.0, delta)))


def test_smoothness_rate_and_radius_by_hand():
    # Softmax tables: B1^2 = 2, B2 = 1/2.
    assert close(bounds.smoothness(0.5, 2.0, math.sqrt(2), 0.5), 10.0)
    assert close(bounds.rate(10.0, 3.0, 6), 10.0)
    # log(2/.05) = 3.6889; 2 sqrt(3.6889/200) = .27162; a further 1/(1 - .5).
    assert close(bounds.hoeffding_radius(1.0, 100, 0.05), 0.271620, 1e-5)
    assert close(bounds.hoeffding_radius(1.0, 100, 0.05, gamma=0.5), 0.543241, 1e-5)
    assert bounds.hoeffding_radius(1.0, 0, 0.05) == INF


def test_hoeffding_covers_the_worst_case_and_the_printed_form_does_not():
    # Fair coins of +-1, 25 at a time: the printed radius is half as wide and misses too often.
    generator = torch.Generator().manual_seed(0)
    flips = torch.randint(0, 2, (20_000, 25), generator=generator).double() * 2 - 1
    deviation = flips.mean(1).abs()
    radius = bounds.hoeffding_radius(1.0, 25, 0.05)
    assert (deviation > radius).double().mean() <= 0.05
    assert (deviation > radius / 2).double().mean() > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.penalty_trpo(1.0, 1.0, 0.1), "gamma"),
        (lambda: bounds.penalty_trpo(NAN, 1.0, 0.1), "gamma"),
        (lambda: bounds.penalty_trpo(0.5, -1.0, 0.1), "a_max"),
        (lambda: bounds.penalty_trpo(0.5, 1.0, 1.1), "variation"),
        (lambda: variation.tv_from_kl(-0.1), "KL"),
        (lambda: bounds.mean_tv_from_violations(0.1, 2.0), "rate"),
        (lambda: bounds.hoeffding_radius(1.0, 10, 0.0), "eta"),
    ],
)
def test_arguments_outside_their_range_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_batches_give_what_single_calls_give():
    gamma, kl = numbers(0.3, 0.9), torch.rand(2, 4, dtype=torch.float64)
    together = bounds.penalty_naive(gamma, numbers(1, 2), kl)
    alone = [bounds.penalty_naive(gamma[i], float(i + 1), kl[i]) for i in range(2)]
    assert torch.equal(together, torch.stack(alone))
    stale = bounds.penalty_stale(gamma, kl, variation.tv_from_kl(kl))
    assert torch.equal(stale[1], bounds.penalty_stale(0.9, kl[1], variation.tv_from_kl(kl[1])))
    shift = bounds.stale_occupancy_shift(gamma, kl)
    assert torch.equal(shift[0], bounds.stale_occupancy_shift(0.3, kl[0]))
