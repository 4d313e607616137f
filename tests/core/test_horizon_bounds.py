"""The finite-horizon bounds of THEORY §4 by hand, at their ends, and as invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.core import horizon_bounds as horizon
from satune.core.variation import as_float64, tv_from_kl

NAN, INF = math.nan, math.inf


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: float | list[float], relative: float = 1e-13) -> bool:
    return bool(torch.allclose(found, as_float64(expected), rtol=relative, atol=0))


def test_prefix_forms_by_hand():
    forms = horizon.prefix_tv_forms(
        mean_tv_H=numbers(0.1, 0.2, 0.9),
        sup_tv_H=numbers(0.1, 0.2, 1),
        mean_kl_H=numbers(0.02, 0.06, INF),
    )
    assert close(forms["mean"], [0, 0.1, 0.3])
    assert close(forms["sup"], [0, 0.1, 0.28])  # 1 - .9 * .8
    assert close(forms["pinsker"], [0, 0.1, 0.2])  # sqrt(.02/2), sqrt(.08/2)
    huber = [0, math.sqrt(1 - math.exp(-0.02)), math.sqrt(1 - math.exp(-0.08))]
    assert close(forms["bretagnolle_huber"], huber, 1e-12)
    least = horizon.prefix_tv(
        mean_tv_H=numbers(0.05, 0.2, 0.9), sup_tv_H=numbers(0.1, 0.2, 1), mean_kl_H=numbers(1, 1, 1)
    )
    assert close(least, [0, 0.05, 0.25])
    assert horizon.prefix_tv(mean_kl_H=numbers(INF, 0)).tolist() == [0, 1]
    assert horizon.prefix_tv(mean_tv_H=numbers(0.8, 0.8, 0)).tolist() == [0, 0.8, 1]
    with pytest.raises(ValueError, match="give"):
        horizon.prefix_tv()


def test_two_and_three_turns_of_one_delta():
    # Two: 2 a a = delta with a = sqrt(delta/2). Three: 2a(a + sqrt(delta)) = (1 + sqrt 2) delta,
    # but 1 - (1-a)^2 < sqrt(delta) for large a, and a is smaller beyond 1.594.
    assert close(horizon.penalty_uniform(0.01, 2), 0.01)
    assert close(horizon.penalty_uniform(0.01, 3), (1 + math.sqrt(2)) * 0.01)
    for delta in (1e-9, 0.01, 0.3, 1.5, 3.0):
        assert horizon.penalty_uniform(delta, 2) <= delta * (1 + 1e-12)
        assert horizon.penalty_uniform(delta, 3) <= 2.42 * delta
    assert horizon.penalty_uniform(0.01, 1) == 0 and horizon.penalty_uniform(0.01, 0) == 0
    assert horizon.penalty_uniform(INF, 3) == 4  # 2 (1 * 0 + 1 * 1 + 1 * 1)
    with pytest.raises(ValueError, match="own steps"):
        horizon.penalty_uniform(0.01, -1)


def test_a_thousand_tokens_are_vacuous():
    # delta sum_{h<1000} sqrt(h) = 1e-4 * 2.1066e4 = 2.1 against sqrt(.1/2) = .2236.
    penalty = horizon.penalty_uniform(1e-4, 1000)
    assert close(penalty, 1e-4 * sum(math.sqrt(h) for h in range(1000)), 1e-9)
    assert 2.10 < penalty < 2.11
    assert close(horizon.largest_gain(0.1), math.sqrt(0.05))
    assert horizon.largest_gain(numbers(0, INF)).tolist() == [0, 1]


def test_one_own_turn_costs_nothing():
    assert horizon.penalty_one_turn(numbers(0, 1, 2)).tolist() == [0, 0, INF]
    assert horizon.penalty_horizon(numbers(1), horizon.prefix_tv(mean_kl_H=numbers(INF))) == 0


def test_sup_free_by_hand():
    # Old tosses a fair coin twice; new says heads with .6 first, and .8 after heads, .5 after
    # tails. r_1 = 1.2 or .8; r_2 = 1.6, .4 after heads, 1 after tails.
    # 1/2 (1/4)(.2 * .6 + .2 * .6 + 0 + 0) = .03.
    ratios = numbers(1.2, 1.2, 0.8, 0.8), numbers(1.6, 0.4, 1, 1)
    log_ratio_EH = torch.stack(ratios, dim=-1).log()
    assert close(horizon.penalty_sup_free(log_ratio_EH), 0.03)
    weights_E = numbers(2, 2, 0, 0)
    assert close(horizon.penalty_sup_free(log_ratio_EH, weights_E), 0.06)


def test_sup_free_at_its_ends():
    zero = horizon.penalty_sup_free(numbers(0, 0).expand(3, 2))
    assert zero == 0
    # New never takes what old took first: r = 0, |0 - 1| |e - 1|/2 for the step after.
    assert close(horizon.penalty_sup_free(torch.tensor([[-INF, 1.0]])), 0.5 * (math.e - 1), 1e-12)
    # A single step costs nothing, even where its ratio overflows.
    assert horizon.penalty_sup_free(torch.tensor([[1e4]])) == 0
    # What old never draws counts for nothing, whatever its ratio.
    rows = torch.tensor([[0.1, 0.1], [INF, -INF]])
    found = horizon.penalty_sup_free(rows, numbers(1, 0))
    assert close(found, 0.5 * math.expm1(as_float64(rows[0, 0])) ** 2, 1e-6)


def test_agents_updated_together():
    # Two agents in the first moment, the second agent alone in the second.
    joint = horizon.updated_together(
        sup_tv_NH=torch.stack([numbers(0.1, 0), numbers(0.2, 0.3)]),
        mean_tv_NH=torch.stack([numbers(0.1, 0), numbers(0.2, 0.3)]),
        mean_kl_NH=torch.stack([numbers(0.01, 0), numbers(0.01, 0.02)]),
    )
    assert close(joint["sup_tv_H"], [0.28, 0.3])
    assert close(joint["mean_tv_H"], [0.3, 0.3])
    assert close(joint["mean_kl_H"], [0.02, 0.02])
    # 2 * .3 * TV_{<2}, the least of .3, .28 and sqrt(.02/2) = .1.
    penalty = horizon.penalty_horizon(joint["sup_tv_H"], horizon.prefix_tv(**joint))
    assert close(penalty, 0.06)


@given(st.lists(st.floats(0, 3), min_size=1, max_size=6))
def test_the_least_form_is_a_tv_that_grows(kls: list[float]):
    kl_H = numbers(*kls)
    tv_H = tv_from_kl(kl_H)
    forms = horizon.prefix_tv_forms(mean_tv_H=tv_H, sup_tv_H=tv_H, mean_kl_H=kl_H)
    least = horizon.prefix_tv(mean_tv_H=tv_H, sup_tv_H=tv_H, mean_kl_H=kl_H)
    assert least[0] == 0 and bool((least <= 1).all()) and bool((least.diff() >= -1e-15).all())
    assert all(bool((least <= form).all()) for form in forms.values())
    assert horizon.penalty_horizon(tv_H, least) <= horizon.penalty_horizon(tv_H, least * 0 + 1)
