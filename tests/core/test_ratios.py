"""Log-ratios, effective sample size and weights, by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from satune.core.ratios import (
    capped_weights,
    effective_sample_size,
    sequence_log_ratio,
    sum_by,
    token_log_ratio,
)


def test_tokens_and_episodes():
    # Episode 0 has turns 0 (tokens a, b) and 1 (token c); episode 2 has turn 2 (token d);
    # episode 1 has no own token, so its ratio is 1, its log 0.
    new = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    old = torch.tensor([-1.5, -1.0, -3.5, -4.25], requires_grad=True)
    episode = torch.tensor([0, 0, 0, 2])
    assert token_log_ratio(new, old).tolist() == [0.5, -1.0, 0.5, 0.25]
    u = sequence_log_ratio(new, old, episode, 3)
    assert u.tolist() == [0.0, 0.0, 0.25]
    (u * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert new.grad is not None and new.grad.tolist() == [2.0, 2.0, 2.0, 5.0]
    assert old.grad is None


def test_sum_by_of_nothing():
    assert sum_by(torch.zeros(0), torch.zeros(0).long(), 2).tolist() == [0.0, 0.0]


def test_effective_sample_size():
    # w = (1, 1, 2): 16/6. A common factor, however large, cancels.
    log_weights = torch.tensor([1.0, 1.0, 2.0]).log()
    assert effective_sample_size(log_weights) == pytest.approx(16 / 6, rel=1e-6)
    assert effective_sample_size(log_weights + 5000) == pytest.approx(16 / 6, rel=1e-3)
    assert effective_sample_size(log_weights.double() - 5000) == pytest.approx(16 / 6, rel=1e-9)
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7, rel=1e-12)
    assert effective_sample_size(torch.tensor([0.0, -math.inf])) == 1.0
    assert effective_sample_size(torch.tensor([-math.inf])) == 0.0
    assert effective_sample_size(torch.zeros(0)) == 0.0
    assert math.isnan(effective_sample_size(torch.tensor([0.0, math.nan])))
    assert math.isnan(effective_sample_size(torch.tensor([0.0, math.inf])))


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30))
def test_effective_sample_size_lies_between_one_and_the_count(log_weights):
    size = effective_sample_size(torch.tensor(log_weights, dtype=torch.float64))
    assert 1 - 1e-9 <= size <= len(log_weights) * (1 + 1e-9)


def test_capped_weights():
    # w = (1, 4, 5) capped at 2: (1, 2, 2), of the total 10 a share of 5/10 is cut away.
    log_weights = torch.tensor([1.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True).log()
    weights, share = capped_weights(log_weights, 2.0)
    assert weights.tolist() == pytest.approx([1, 2, 2]) and share == pytest.approx(0.5)
    assert not weights.requires_grad
    weights, share = capped_weights(log_weights, None)
    assert weights.tolist() == pytest.approx([1, 4, 5]) and share == 0.0
    weights, share = capped_weights(torch.tensor([0.0, 1000.0]), 3.0)
    assert weights.tolist() == pytest.approx([1, 3]) and share == 1.0
    assert capped_weights(log_weights, 5.5)[1] == 0.0
    assert capped_weights(torch.tensor([-math.inf]), 2.0)[1] == 0.0
    with pytest.raises(ValueError, match="positive"):
        capped_weights(log_weights, 0.0)
