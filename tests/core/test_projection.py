"""The projection against bisection in extended precision, closed forms, and hand-made scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from satune.core import projection
from satune.core.logprobs import exact_kl
from satune.core.projection import (
    alignment_score,
    alignment_terms,
    mixture_logprobs,
    project,
)

INF = math.inf


def pairs(states: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of peaked, flat, nearly disjoint, nearly identical and unrelated pairs, float32."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(states, vocabulary, generator=generator)

    kind_N1 = torch.arange(states)[:, None] % 6
    half_V = torch.arange(vocabulary) < vocabulary // 2
    p_NV, q_NV = noise(2.0), noise(2.0)
    p_NV = torch.where(kind_N1 == 0, p_NV * 10, p_NV)  # peaked, elsewhere than q
    q_NV = torch.where(kind_N1 == 1, noise(0.01), q_NV)  # q flat
    p_NV = torch.where(kind_N1 == 2, p_NV + 40.0 * half_V, p_NV)  # nearly disjoint
    q_NV = torch.where(kind_N1 == 2, q_NV - 40.0 * half_V, q_NV)
    q_NV = torch.where(kind_N1 == 3, p_NV + noise(1e-4), q_NV)  # nearly identical
    q_NV = torch.where(kind_N1 == 4, p_NV + noise(0.3), q_NV)  # a close relative
    return p_NV, q_NV


def reference(p_NV: Tensor, q_NV: Tensor, delta: float) -> tuple[np.ndarray, ...]:
    """lambda, KL(pi‖p), KL(p‖pi), KL(q‖p) by plain bisection and plain sums, 64 bits mantissa."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    log_p, log_q = (log_softmax(each.numpy().astype(np.longdouble)) for each in (p_NV, q_NV))

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (np.exp(a) * (a - b)).sum(-1)

    def mixed(at: np.ndarray) -> np.ndarray:
        return log_softmax(log_p + at[:, None] * (log_q - log_p))

    low, high = np.zeros(len(log_p), np.longdouble), np.ones(len(log_p), np.longdouble)
    for _ in range(64):
        middle = (low + high) / 2
        inside = kl(mixed(middle), log_p) <= delta
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    own = kl(log_q, log_p)
    found = np.where(own <= delta, 1, low)
    return found, kl(mixed(found), log_p), kl(log_p, mixed(found)), own


@pytest.mark.parametrize("delta", [1e-9, 1e-4, 0.01, 0.5])
def test_ten_thousand_pairs_against_bisection(delta):
    p_NV, q_NV = pairs(10_000, 24, seed=0)
    found = project(p_NV, q_NV, delta)
    lambda_N, kl_N, reverse_N, own_N = (
        torch.from_numpy(each.astype(np.float64)) for each in reference(p_NV, q_NV, delta)
    )
    outside_N = own_N > delta
    assert torch.equal(found.inside_N, ~outside_N) and not bool(found.infeasible_N.any())
    assert int(outside_N.sum()) > 100
    # What is claimed: never above, and equal to delta wherever the newcomer lies outside.
    assert float(found.kl_N.max()) <= delta
    assert float((found.kl_N / delta - 1).abs()[outside_N].max()) <= 2e-8
    assert torch.allclose(found.lambda_N, lambda_N, rtol=1e-6, atol=1e-12)
    # The margin of 1e-8 of delta moves lambda and both divergences by as little.
    assert torch.allclose(found.kl_N, kl_N, rtol=3e-8, atol=1e-14)
    assert torch.allclose(found.reverse_kl_N, reverse_N, rtol=3e-6, atol=1e-14)
    # Distributions of 20 nats' spread take most; what a model and its successor give, a few.
    usual_N = torch.arange(10_000) % 6 >= 3
    assert int(found.iterations_N[usual_N].max()) <= 7 and int(found.iterations_N.max()) <= 20


@pytest.mark.parametrize("delta", [1e-6, 0.01, 0.5])
def test_the_policies_are_as_far_apart_as_is_said(delta):
    # Measured by the trust region's own exact KL, on the mixture's log-probabilities.
    p_NV, q_NV = (each.double() for each in pairs(3000, 200, seed=1))
    found = project(p_NV, q_NV, delta)
    mixed_NV = mixture_logprobs(p_NV, q_NV, found.lambda_N)
    kl_N, reverse_N = exact_kl(mixed_NV, p_NV), exact_kl(p_NV, mixed_NV)
    assert float(kl_N.max()) <= delta
    assert torch.allclose(kl_N, found.kl_N, rtol=1e-8, atol=1e-13)
    assert torch.allclose(reverse_N, found.reverse_kl_N, rtol=1e-8, atol=1e-13)
    outside_N = ~found.inside_N
    assert float((kl_N / delta - 1).abs()[outside_N].max()) <= 1e-6


def test_two_tokens_in_closed_form():
    # p = (1/2, 1/2), q = (e^c, 1)/(1 + e^c): pi_lambda is the same with lambda c. Choose c = 4 and
    # lambda = 1/4: pi = (e, 1)/(1 + e) = (.7311, .2689), KL(pi‖p) = log 2 - H(pi)
    # = .693147 - .582203 = .110944; KL(p‖pi) = -log 2 - (log .7311 + log .2689)/2 = .120115.
    share = math.e / (1 + math.e)
    delta = math.log(2) + share * math.log(share) + (1 - share) * math.log(1 - share)
    reverse = -math.log(2) - (math.log(share) + math.log(1 - share)) / 2
    assert (delta, reverse) == (
        pytest.approx(0.110944, abs=1e-6),
        pytest.approx(0.120115, abs=1e-6),
    )
    p_NV, q_NV = torch.zeros(1, 2), torch.tensor([[4.0, 0.0]])
    found = project(p_NV, q_NV, delta)
    assert float(found.lambda_N) == pytest.approx(0.25, rel=1e-7)
    assert float(found.kl_N) == pytest.approx(delta, rel=2e-8)
    assert float(found.reverse_kl_N) == pytest.approx(reverse, rel=1e-7)
    mixed_NV = mixture_logprobs(p_NV, q_NV, found.lambda_N)
    assert mixed_NV.exp().tolist()[0] == pytest.approx([share, 1 - share], abs=1e-7)
    # Wider than KL(q‖p) = log 2 - H(.982014, .017986) = .693147 - .090095: the newcomer itself.
    all_of_it = project(p_NV, q_NV, 0.7)
    assert float(all_of_it.lambda_N) == 1.0 and bool(all_of_it.inside_N)
    assert float(all_of_it.kl_N) == pytest.approx(0.603052, abs=1e-6)
    assert int(all_of_it.iterations_N) == 0


def test_tokens_that_one_of_them_lacks():
    delta = 0.05
    p_NV = torch.tensor(
        [
            [0.0, 1.0, -INF, 2.0],  # p lacks a token that q likes
            [0.0, 0.0, -3.5, 0.0],  # q lacks 1% of p's mass
            [0.0, 0.0, 0.0, 0.0],  # q lacks 25% of it
            [0.0, 0.0, -INF, -INF],  # nothing in common
            [0.0, 0.0, -INF, -6.0],  # the same but for .12%
        ]
    )
    q_NV = torch.tensor(
        [
            [1.0, 0.0, 9.0, 4.0],
            [1.0, 0.0, -INF, 4.0],
            [1.0, 0.0, -INF, 4.0],
            [-INF, -INF, 0.0, 0.0],
            [0.0, 0.0, -3e38, -3e38],  # a mask is a mask, whatever it is made of
        ]
    )
    found = project(p_NV, q_NV, delta)
    assert found.infeasible_N.tolist() == [False, False, True, True, False]
    assert found.inside_N.tolist() == [False, False, False, False, True]
    assert found.lambda_N[2:4].tolist() == [0.0, 0.0] and found.kl_N[2:4].tolist() == [0.0, 0.0]
    assert found.reverse_kl_N[2:4].tolist() == [0.0, 0.0]
    assert found.reverse_kl_N[[1, 4]].tolist() == [INF, INF]
    # -log(1 - e^-6/(2 + e^-6)) = log(1 + e^-6/2)
    assert float(found.kl_N[4]) == pytest.approx(math.log1p(math.exp(-6) / 2), rel=1e-9)
    # The first row is as if the token did not exist, the second pays for its lost mass.
    short = project(p_NV[:1, [0, 1, 3]], q_NV[:1, [0, 1, 3]], delta)
    assert float(short.lambda_N) == pytest.approx(float(found.lambda_N[0]), rel=1e-12)
    lost = math.log1p(math.exp(-3.5) / 3)
    rest = project(p_NV[1:2, [0, 1, 3]], q_NV[1:2, [0, 1, 3]], delta - lost)
    assert float(found.lambda_N[1]) == pytest.approx(float(rest.lambda_N), rel=1e-6)
    assert float(found.kl_N[1]) == pytest.approx(delta, rel=2e-8)
    mixed_NV = mixture_logprobs(p_NV, q_NV, found.lambda_N)
    assert mixed_NV.isneginf().nonzero().tolist() == [
        [0, 2],
        [1, 2],
        [3, 2],
        [3, 3],
        [4, 2],
        [4, 3],
    ]
    assert torch.allclose(mixed_NV.logsumexp(-1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(mixed_NV[2:4], p_NV[2:4].log_softmax(-1))
    kl_N = exact_kl(mixed_NV.double(), p_NV.double())
    assert torch.allclose(kl_N, found.kl_N, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [300.0, 3000.0])
def test_differences_beyond_any_exponent(scale):
    generator = torch.Generator().manual_seed(3)
    p_NV = scale * torch.randn(300, 30, generator=generator)
    q_NV = scale * torch.randn(300, 30, generator=generator)
    for delta in (1e-8, 0.01):
        found = project(p_NV, q_NV, delta)
        assert float(found.kl_N.max()) <= delta
        assert float((found.kl_N / delta - 1).abs()[~found.inside_N].max()) <= 1e-6
        assert not bool(found.infeasible_N.any())


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(1e-7, 2.0), st.sampled_from([0.1, 1.0, 10.0, 100.0]))
def test_invariants(seed, delta, scale):
    generator = torch.Generator().manual_seed(seed)
    p_NV = scale * torch.randn(8, 12, generator=generator)
    q_NV = scale * torch.randn(8, 12, generator=generator)
    found = project(p_NV, q_NV, delta)
    assert bool((found.kl_N <= delta).all())
    assert bool(((found.lambda_N > 0) & (found.lambda_N <= 1)).all())
    # More room, a larger step; constants in logits mean nothing; the order of states neither.
    wider = project(p_NV, q_NV, 1.1 * delta)
    assert bool((wider.lambda_N >= found.lambda_N).all())
    moved = project(p_NV.double() + 3, q_NV.double() - 5, delta)
    assert torch.allclose(moved.lambda_N, found.lambda_N, rtol=1e-6, atol=0)
    turned = project(p_NV.flip(0), q_NV.flip(0), delta)
    assert torch.allclose(turned.lambda_N.flip(0), found.lambda_N, rtol=1e-9, atol=0)


def test_blocks_and_the_cap(monkeypatch):
    p_NV, q_NV = pairs(50, 40, seed=4)
    whole = project(p_NV, q_NV, 0.02)
    mixed_NV = mixture_logprobs(p_NV, q_NV, whole.lambda_N)
    targets_N = torch.arange(50) % 40
    terms_N = alignment_terms(p_NV, q_NV, targets_N, 0.02)
    monkeypatch.setattr(projection, "_BLOCK_ON_CPU", 130)
    cut = project(p_NV, q_NV, 0.02)
    assert torch.allclose(cut.lambda_N, whole.lambda_N, rtol=1e-9, atol=0)
    assert torch.allclose(mixture_logprobs(p_NV, q_NV, whole.lambda_N), mixed_NV)
    assert torch.allclose(alignment_terms(p_NV, q_NV, targets_N, 0.02), terms_N, rtol=1e-12)
    # Out of iterations: the lower end, a true policy of the family inside the region.
    monkeypatch.setattr(projection, "ITERATIONS", 2)
    early = project(p_NV, q_NV, 0.02)
    outside_N = ~whole.inside_N
    assert bool((early.kl_N <= 0.02).all()) and bool((early.lambda_N <= whole.lambda_N).all())
    assert bool((early.lambda_N < whole.lambda_N)[outside_N].any())
    kl_N = exact_kl(mixture_logprobs(p_NV.double(), q_NV.double(), early.lambda_N), p_NV.double())
    assert torch.allclose(kl_N, early.kl_N, rtol=1e-8, atol=1e-13)
    nothing = project(p_NV[:0], q_NV[:0], 0.02)
    assert nothing.lambda_N.shape == (0,) and nothing.inside_N.dtype == torch.bool
    assert mixture_logprobs(p_NV[:0], q_NV[:0], nothing.lambda_N).shape == (0, 40)
    assert alignment_terms(p_NV[:0], q_NV[:0], targets_N[:0], 0.02).shape == (0,)


def test_refusals():
    p_NV = torch.zeros(2, 3)
    for q_NV in (torch.full((2, 3), math.nan), torch.full((2, 3), INF), torch.full((2, 3), -INF)):
        with pytest.raises(ValueError, match="NaN, \\+inf or all masked"):
            project(p_NV, q_NV, 0.1)
    with pytest.raises(ValueError, match="the same"):
        project(p_NV, torch.zeros(2, 4), 0.1)
    with pytest.raises(ValueError, match="positive"):
        project(p_NV, p_NV, 0.0)
    with pytest.raises(ValueError, match="no vocabulary"):
        project(torch.zeros(2, 0), torch.zeros(2, 0), 0.1)
    with pytest.raises(ValueError, match="one lambda"):
        mixture_logprobs(p_NV, p_NV, torch.zeros(3))
    with pytest.raises(ValueError, match="one target"):
        alignment_terms(p_NV, p_NV, torch.zeros(3, dtype=torch.long), 0.1)


# -- the alignment score --------------------------------------------------------------------------


def test_alignment_terms_by_hand():
    # p = (1/2, 1/4, 1/4), z = (a, a + 1, a + 1): y = (-1/2, 1/2, 1/2), Var = 1/4, so with
    # delta = .02 lambda_0 = .2/.5 and the terms are -.2 and +.2 whatever a and scale of z are.
    p_NV = torch.tensor([[math.log(2), 0.0, 0.0]]).repeat(3, 1)
    z_NV = torch.tensor([[5.0, 6.0, 6.0], [0.0, 0.1, 0.1], [0.0, 0.0, 0.0]])
    terms = [
        alignment_terms(p_NV, p_NV + z_NV, torch.full((3,), token), 0.02).tolist()
        for token in (0, 1)
    ]
    assert terms[0] == pytest.approx([-0.2, -0.2, 0.0], abs=1e-6)
    assert terms[1] == pytest.approx([0.2, 0.2, 0.0], abs=1e-6)
    # q lacks the first token: the limit of z = (-c, z1, z2) as c grows.
    q_NV = torch.tensor([[-INF, 0.3, 0.9], [-1e5, 0.3, 0.9], [-3e38, 0.3, 0.9]])
    taken_N = torch.tensor([0, 0, 0])
    assert alignment_terms(p_NV, q_NV, taken_N, 0.02).tolist() == pytest.approx(
        [-0.2] * 3, abs=1e-5
    )
    assert alignment_terms(p_NV, q_NV, taken_N + 1, 0.02).tolist() == pytest.approx(
        [0.2] * 3, abs=1e-5
    )


def test_the_score_by_hand():
    # Two problems of two episodes. Leave-one-out: R - b = (1, -1) for the first, (-.5, .5) for the
    # second. Sums of terms: .3, -.1 | 0, .4. Means: (.3 + .1)/2 = .2 and (0 + .2)/2 = .1.
    # S = .15, standard error = std(.2, .1)/sqrt 2 = .0707107/1.4142136 = .05.
    terms_T = torch.tensor([0.1, 0.2, -0.1, 0.5, -0.1])
    episode_T = torch.tensor([0, 0, 1, 3, 3])
    found = alignment_score(
        terms_T, episode_T, torch.tensor([1.0, 0.0, 0.0, 0.5]), torch.tensor([7, 7, 2, 2])
    )
    assert found.score == pytest.approx(0.15) and found.problems == 2
    assert found.standard_error == pytest.approx(0.05)
    alone = alignment_score(
        terms_T[:3], episode_T[:3], torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    )
    assert alone.score == pytest.approx(0.2) and alone.standard_error is None
    with pytest.raises(ValueError, match="one episode only"):
        alignment_score(terms_T[:2], episode_T[:2], torch.tensor([1.0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="no episode"):
        alignment_score(terms_T[:0], episode_T[:0], torch.zeros(0), torch.zeros(0).long())


def test_the_score_is_the_first_order_of_the_gain():
    # One state, one token: J(pi_lambda) - J(p) = sum_a (pi - p) R, and S is its exact expectation
    # with lambda_0 for lambda, so they agree up to second order in sqrt(delta).
    generator = torch.Generator().manual_seed(5)
    p_NV, q_NV = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    reward_V = torch.rand(6, generator=generator, dtype=torch.float64)
    relative = []
    for delta in (1e-4, 1e-6, 1e-8):
        mixed_NV = mixture_logprobs(p_NV, q_NV, project(p_NV, q_NV, delta).lambda_N)
        gain = float(((mixed_NV.exp() - p_NV.softmax(-1)) * reward_V).sum())
        each = alignment_terms(p_NV.expand(6, 6), q_NV.expand(6, 6), torch.arange(6), delta)
        score = float((p_NV.softmax(-1)[0] * each * reward_V).sum())
        relative.append(abs(score / gain - 1))
    assert relative[0] < 0.05 and relative[1] < 0.005 and relative[2] < 0.0005


@pytest.mark.gpu
def test_on_a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    p_NV, q_NV = pairs(2000, 1000, seed=6)
    here, there = project(p_NV, q_NV, 0.01), project(p_NV.cuda(), q_NV.cuda(), 0.01)
    assert there.lambda_N.is_cuda and float(there.kl_N.max()) <= 0.01
    assert torch.allclose(there.lambda_N.cpu(), here.lambda_N, rtol=1e-7, atol=0)
    mixed_NV = mixture_logprobs(p_NV.cuda(), q_NV.cuda(), there.lambda_N)
    assert torch.allclose(mixed_NV.cpu(), mixture_logprobs(p_NV, q_NV, here.lambda_N), atol=1e-5)
