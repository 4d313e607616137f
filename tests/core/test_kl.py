"""exact_kl: hand-computed values, float32 precision, gradients, masked and missing tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from satune.core.logprobs import exact_kl

INF = math.inf


def plain_kl(p: Tensor, q: Tensor) -> Tensor:
    """The textbook sum in float64, on p's support."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return torch.where(log_p > -INF, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def test_hand_computed():
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3); the other way
    # 1/4 log(1/2) + 3/4 log(3/2). Constants added to a row of logits change nothing.
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log() + 3
    q = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log() - 7
    assert exact_kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-13)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert exact_kl(q, p).item() == pytest.approx(expected, rel=1e-13)


def test_equal_rows_give_exactly_zero_with_exactly_zero_gradient():
    p = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = p.detach().clone().requires_grad_()
    kl = exact_kl(p, q)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(5))
    assert p.grad is not None and torch.equal(p.grad, torch.zeros(5, 40))
    assert q.grad is not None and torch.equal(q.grad, torch.zeros(5, 40))


@pytest.mark.parametrize("step, size", [(1.35e-5, 9e-11), (1e-3, 5e-7), (0.3, 0.045)])
def test_float32_keeps_small_divergences_at_a_large_vocabulary(step, size):
    generator = torch.Generator().manual_seed(1)
    p = 3 * torch.randn(2, 151_936, generator=generator)
    q = p + step * torch.randn(2, 151_936, generator=generator)
    for left, right in ((p, q), (q, p)):
        # float64 on the same float32 logits. The plain sum cancels there too (1e-16 of 9e-11), so
        # the truth is the centred series, whose next term is y^5/5040, negligible for |y| < .01.
        d = right.double() - left.double()
        prob = left.double().softmax(-1)
        y = d - (prob * d).sum(-1, keepdim=True)
        series = y**2 * (1 / 2 + y / 6 + y**2 / 24 + y**3 / 120 + y**4 / 720)
        k = series if step < 0.01 else torch.expm1(y) - y
        truth = torch.log1p((prob * k).sum(-1))
        assert 0.5 * size < truth.min() and truth.max() < 2 * size
        assert (exact_kl(left, right).double() / truth - 1).abs().max() < 2e-6


def test_float32_gradient_is_as_exact_as_the_value():
    # dKL/dlogit_q = q - p: in float32 the difference of two softmaxes has lost all digits here.
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(1, 1000, generator=generator)
    q = (p + 1e-6 * torch.randn(1, 1000, generator=generator)).requires_grad_()
    exact_kl(p, q).sum().backward()
    truth = q.detach().double().softmax(-1) - p.double().softmax(-1)
    assert q.grad is not None
    assert ((q.grad.double() - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize("spread", [1e-4, 0.02, 1.0, 6.0])
def test_value_and_gradients_agree_with_the_textbook_sum(spread):
    generator = torch.Generator().manual_seed(3)
    p = (2 * torch.randn(6, 9, dtype=torch.float64, generator=generator)).requires_grad_()
    noise = spread * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    q = (p.detach() + noise).requires_grad_()
    mine = torch.autograd.grad(exact_kl(p, q).sum(), (p, q))
    textbook = torch.autograd.grad(plain_kl(p, q).sum(), (p, q))
    torch.testing.assert_close(exact_kl(p, q), plain_kl(p, q), rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(mine, textbook, rtol=1e-9, atol=1e-14)


def test_autograd_checks_in_both_arguments():
    generator = torch.Generator().manual_seed(4)
    p = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    q = (1.5 * torch.randn(3, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(exact_kl, (p, q))


def test_masked_tokens():
    # Column 2 is masked in both; column 1 is masked in p only, where q keeps a third of its mass:
    # p = (1/2, 0, 0, 1/2), q = (1/3, 1/3, 0, 1/3), KL(p||q) = log(3/2), KL(q||p) = inf.
    p = torch.tensor([[0.0, -INF, -INF, 0.0]], dtype=torch.float64).requires_grad_()
    q = torch.tensor([[0.0, 0.0, -INF, 0.0]], dtype=torch.float64).requires_grad_()
    kl = exact_kl(p, q)
    assert kl.item() == pytest.approx(math.log(1.5), rel=1e-14)
    grad_p, grad_q = torch.autograd.grad(kl.sum(), (p, q))
    # Both rows are flat on p's support, so moving p's logits changes nothing to first order.
    assert grad_p.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(
        grad_q, torch.tensor([[-1 / 6, 1 / 3, 0.0, -1 / 6]], dtype=torch.float64)
    )
    assert exact_kl(q, p).item() == INF


def test_an_infinite_row_leaves_the_other_rows_and_a_silenced_gradient_alone():
    p = torch.zeros(2, 2, requires_grad=True)
    q = torch.tensor([[0.0, -INF], [0.0, 1.0]], requires_grad=True)
    kl = exact_kl(p, q)
    assert kl[0].item() == INF and math.isfinite(kl[1].item())
    torch.where(kl.isfinite(), kl, 0.0).sum().backward()
    assert p.grad is not None and q.grad is not None
    assert p.grad[0].tolist() == [0.0, 0.0] and q.grad[0].tolist() == [0.0, 0.0]
    assert p.grad.isfinite().all() and q.grad.isfinite().all()
    grad = torch.autograd.grad(exact_kl(p, q).sum(), p)[0]
    assert grad[0].isnan().all()


def test_distant_peaked_rows_neither_overflow_nor_vanish():
    # p = (1, e^-110), q = (e^-110, 1): KL = 110 to float32 rounding, though e^-110 underflows and
    # e^110 overflows in float32; dKL/dlogit_q = q - p = (-1, 1).
    p = torch.tensor([[110.0, 0.0]])
    q = torch.tensor([[0.0, 110.0]], requires_grad=True)
    kl = exact_kl(p, q)
    assert kl.item() == pytest.approx(110.0, rel=1e-6)
    assert torch.autograd.grad(kl.sum(), q)[0].tolist() == [[-1.0, 1.0]]


def test_gradient_beyond_overflow():
    # q - p with q = (0, 1/(1 + e), e/(1 + e)) to float32 rounding.
    p = torch.tensor([[110.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 110.0, 111.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(exact_kl(p, q).sum(), q)
    assert gradient[0].tolist() == pytest.approx([-1.0, 1 / (1 + math.e), math.e / (1 + math.e)])


def test_mass_that_q_moves_to_a_token_almost_forgotten_by_p():
    # p = (1, e^-100), a subnormal number in float32 with two digits left; q = (1, e^-20) / (1 +
    # e^-20): KL = log(1 + e^-20) up to e^-95.
    kl = exact_kl(torch.tensor([[0.0, -100.0]]), torch.tensor([[0.0, -20.0]]))
    assert kl.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-5)


def test_what_is_not_a_distribution_is_not_finite():
    good = torch.zeros(1, 3)
    for bad in ([0.0, math.nan, 0.0], [-INF, -INF, -INF], [INF, 0.0, 0.0]):
        row = torch.tensor([bad])
        assert not exact_kl(row, good).isfinite().any()
        assert not exact_kl(good, row).isfinite().any()


def test_rows_are_independent_of_how_many_stand_beside_them():
    # 7 x 20,000 numbers are several blocks of work; one difficult row per call must not matter.
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(7, 20_000, generator=generator)
    q = p + 0.5 * torch.randn(7, 20_000, generator=generator)
    p[3, 5] = -INF
    q[4, :9] += 200
    p.requires_grad_()
    q.requires_grad_()
    kl = exact_kl(p, q)
    grads = torch.autograd.grad((kl * torch.arange(7)).sum(), (p, q))
    torch.testing.assert_close(kl.double(), plain_kl(p, q), rtol=1e-5, atol=0)
    for row in range(7):
        assert torch.equal(exact_kl(p[row], q[row]), kl[row])
        alone = torch.autograd.grad(row * exact_kl(p[row], q[row]), (p, q))
        assert torch.equal(alone[0][row], grads[0][row])
        assert torch.equal(alone[1][row], grads[1][row])
    assert torch.equal(exact_kl(p.view(7, 1, -1), q.view(7, 1, -1)), kl.unsqueeze(1))


def test_no_rows():
    p = torch.zeros(0, 5, requires_grad=True)
    kl = exact_kl(p, torch.zeros(0, 5))
    kl.sum().backward()
    assert kl.shape == (0,) and p.grad is not None and p.grad.shape == (0, 5)


def test_half_precision_is_lifted_and_shapes_are_checked():
    assert exact_kl(torch.zeros(1, 3).bfloat16(), torch.ones(1, 3).half()).dtype == torch.float32
    for p, q in ((torch.zeros(1, 3), torch.zeros(2, 3)), (torch.zeros(1, 0), torch.zeros(1, 0))):
        with pytest.raises(ValueError, match="same \\[N, V\\]"):
            exact_kl(p, q)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(1e-6, 30),
    vocabulary=st.integers(1, 40),
)
def test_never_negative_and_right(seed, spread, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    p = spread * torch.randn(4, vocabulary, generator=generator)
    q = spread * torch.randn(4, vocabulary, generator=generator)
    kl = exact_kl(p, q)
    assert (kl >= -1e-7 * kl.abs()).all()
    # The textbook sum cancels to about 1e-15 in float64.
    torch.testing.assert_close(kl.double(), plain_kl(p, q), rtol=2e-5, atol=1e-13)
