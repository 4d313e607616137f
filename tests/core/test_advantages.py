"""Group-relative advantages, GAE with truncated traces, the overlong penalty."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from satune.core.advantages import (
    gae,
    group_advantages,
    groups_with_variance,
    overlong_penalty,
    truncated_traces,
)

NAN = math.nan


def rewards_and_groups():
    # Interleaved groups of sizes 3 and 2 under arbitrary labels.
    rewards = torch.tensor([0.0, 1.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    return rewards, torch.tensor([7, -4, 7, -4, 7])


@pytest.mark.parametrize(
    "baseline, expected",
    [
        # Group 7: rewards 0, 3, 2, mean 5/3, others' means 5/2, 1, 3/2, largest 3.
        ("mean", [-5 / 3, 0, 4 / 3, 0, 1 / 3]),
        ("leave_one_out", [-5 / 2, 0, 2, 0, 1 / 2]),
        ("max", [-3, 0, 0, 0, -1]),
    ],
)
def test_hand_computed(baseline, expected):
    rewards, groups = rewards_and_groups()
    plain = group_advantages(rewards, groups, baseline=baseline, normalise=False)
    assert plain.tolist() == pytest.approx(expected, abs=1e-15)
    # Variance with ddof 0: (25 + 16 + 1)/9/3 = 14/9.
    divided = group_advantages(rewards, groups, baseline=baseline, eps=0.5, clip=None)
    sigma = math.sqrt(14 / 9) + 0.5
    assert divided.tolist() == pytest.approx([each / sigma for each in expected], abs=1e-15)


def test_clip_acts_above_26_episodes():
    # One success in 27: the mean-centred advantage is sqrt(26) = 5.099 and is clipped to 5.
    rewards = torch.zeros(27, dtype=torch.float64)
    rewards[3] = 1
    group = torch.zeros(27).long()
    free = group_advantages(rewards, group, clip=None, eps=0.0)
    assert free[3].item() == pytest.approx(math.sqrt(26))
    assert group_advantages(rewards, group, eps=0.0)[3].item() == 5.0
    assert group_advantages(rewards[:26], group[:26], eps=0.0)[3].item() == pytest.approx(5.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 / 7])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "max"])
def test_a_constant_group_gives_exactly_zero(value, baseline):
    rewards = torch.full((7,), value)
    got = group_advantages(rewards, torch.zeros(7).long(), baseline=baseline, eps=0.0 + 1e-6)
    assert got.tolist() == [0.0] * 7


def test_a_broken_reward_stays_in_its_group():
    rewards, groups = rewards_and_groups()
    rewards[1] = NAN
    got = group_advantages(rewards, groups)
    assert got[[1, 3]].isnan().all() and got[[0, 2, 4]].isfinite().all()


def test_bad_groups():
    with pytest.raises(ValueError, match="at least 2 samples"):
        group_advantages(torch.zeros(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="one of each an episode"):
        group_advantages(torch.zeros(3), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="leave_one_out"):
        group_advantages(torch.zeros(2), torch.zeros(2).long(), baseline="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip"):
        group_advantages(torch.zeros(2), torch.zeros(2).long(), clip=0.0)
    assert group_advantages(torch.zeros(0), torch.zeros(0).long()).shape == (0,)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    binary=st.booleans(),
)
def test_invariants(seed, sizes, binary):
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rewards = torch.rand(len(group), dtype=torch.float64, generator=generator)
    rewards = rewards.round() if binary else rewards
    for baseline in ("mean", "leave_one_out"):
        got = group_advantages(rewards, group, baseline=baseline)
        size = torch.tensor(sizes)[group]
        assert torch.zeros(len(sizes), dtype=torch.float64).index_add(
            0, group, got
        ).abs().max() == pytest.approx(0.0, abs=1e-9)
        factor = size / (size - 1) if baseline == "leave_one_out" else 1.0
        assert (got.abs() <= factor * (size - 1).double().sqrt() + 1e-9).all()
        shuffled = torch.randperm(len(group), generator=generator)
        again = group_advantages(rewards[shuffled], group[shuffled], baseline=baseline)
        torch.testing.assert_close(again, got[shuffled], rtol=0, atol=1e-9)


def test_groups_with_variance():
    rewards = torch.tensor([1.0, 0.1, 0.0, 0.1, 1.0, NAN, 0.0])
    groups = torch.tensor([3, 5, 3, 5, 3, 8, 8])
    assert (
        groups_with_variance(rewards, groups).tolist()
        == [True, False, True, False, True] + [False] * 2
    )


def test_gae_hand_computed():
    # gamma 1/2, lambda 1/2, rewards (0, 0, 1), values (.2, .4, .6), traces (.9, .5, 1).
    # delta = (0 + .2 - .2, 0 + .3 - .4, 1 - .6) = (0, -.1, .4).
    # A_2 = .4; A_1 = -.1 + 1/4 * 1 * .4 = 0; A_0 = 0 + 1/4 * .5 * 0 = 0. With c_2 = .5 instead:
    # A_1 = -.1 + .05 = -.05, A_0 = 1/4 * .5 * -.05 = -.00625; c_0 plays no part.
    rewards = torch.tensor([[0.0, 0.0, 1.0]] * 2, dtype=torch.float64)
    values = torch.tensor([[0.2, 0.4, 0.6]] * 2, dtype=torch.float64)
    traces = torch.tensor([[0.9, 0.5, 1.0], [0.1, 0.5, 0.5]], dtype=torch.float64)
    got = gae(rewards, values, traces, gamma=0.5, lam=0.5)
    assert got[0].tolist() == pytest.approx([0.0, 0.0, 0.4], abs=1e-15)
    assert got[1].tolist() == pytest.approx([-0.00625, -0.05, 0.4], abs=1e-15)


def test_gae_equals_its_defining_sum():
    generator = torch.Generator().manual_seed(0)
    rewards, values, log_ratio = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    traces = truncated_traces(log_ratio)
    assert (traces <= 1).all() and torch.equal(traces < 1, log_ratio < 0)
    got = gae(rewards, values, traces, gamma=0.9, lam=0.8)
    after = torch.cat([values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    delta = rewards + 0.9 * after - values
    for step in range(6):
        expected = delta[:, step].clone()
        for far in range(1, 6 - step):
            product = traces[:, step + 1 : step + far + 1].prod(dim=1)
            expected += (0.9 * 0.8) ** far * product * delta[:, step + far]
        torch.testing.assert_close(got[:, step], expected, rtol=1e-12, atol=1e-12)


def test_gae_padding_contributes_nothing():
    generator = torch.Generator().manual_seed(1)
    rewards, values, traces = torch.rand(3, 2, 5, dtype=torch.float64, generator=generator)
    lengths = torch.tensor([3, 5])
    short = gae(rewards[:1, :3], values[:1, :3], traces[:1, :3])
    full = gae(rewards[1:], values[1:], traces[1:])
    for each in (rewards, values, traces):
        each[0, 3:] = NAN
    got = gae(rewards, values, traces, lengths=lengths)
    assert torch.equal(got[:1, :3], short) and torch.equal(got[1:], full)
    assert got[0, 3:].tolist() == [0.0, 0.0]
    assert gae(*torch.zeros(3, 2, 0)).shape == (2, 0)
    with pytest.raises(ValueError, match="the same"):
        gae(rewards, values[:, :4], traces)


def test_overlong_penalty():
    # limit 100, buffer 20: free up to 80, half way at 90, -1 from 100 on.
    lengths = torch.tensor([0, 80, 85, 90, 100, 1000])
    got = overlong_penalty(lengths, limit=100, buffer=20)
    assert got.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(lengths, limit=100, buffer=buffer)
