"""The loss of values, and what they explain, by hand."""

import pytest
import torch
from torch import Tensor

from satune.core.values import explained_variance, value_loss


def numbers(*each: float) -> Tensor:
    return torch.tensor(each, dtype=torch.float64)


def test_the_loss_by_hand() -> None:
    values = numbers(0.9, 0.4, 0.0).requires_grad_()
    before, targets, weights = numbers(0.5, 0.5, 0.1), numbers(1.0, 1.0, -1.0), numbers(1, 2, 3)
    # Without a clip: (.01 + 2 * .36 + 3 * 1)/2.
    loss = value_loss(values, before, targets, weights, None)
    assert loss.item() == pytest.approx(1.865, rel=1e-14)
    # With .2: the first is held at .7, error .09 for .01, and gains nothing by going on; the second
    # and third have not moved further than that and are free.
    loss = value_loss(values, before, targets, weights, 0.2)
    assert loss.item() == pytest.approx((0.09 + 0.72 + 3) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.tolist() == pytest.approx([0.0, 2 * -0.6, 3 * 1.0], rel=1e-14)


def test_a_value_that_moved_the_wrong_way_is_pulled_back() -> None:
    values = numbers(0.0).requires_grad_()
    # Held at .3 the error would be .49: the larger one, 1, counts.
    loss = value_loss(values, numbers(0.5), numbers(1.0), numbers(1.0), 0.2)
    assert loss.item() == 0.5 and torch.autograd.grad(loss, values)[0].item() == -1.0


def test_explained_variance_by_hand() -> None:
    returns, even = numbers(0, 1, 0, 1), numbers(1, 1, 1, 1)
    assert explained_variance(returns + 3, returns, even) == pytest.approx(1)
    assert explained_variance(numbers(0.5, 0.5, 0.5, 0.5), returns, even) == pytest.approx(0)
    # Residuals 0, .5, 0, .5: a quarter of the variance stays.
    assert explained_variance(returns / 2, returns, even) == pytest.approx(0.75)
    assert explained_variance(1 - returns, returns, even) == pytest.approx(-3)
    # What has no weight is not counted.
    assert explained_variance(numbers(0, 1, 9, 9), returns, numbers(1, 1, 0, 0)) == pytest.approx(1)
    assert explained_variance(returns, numbers(1, 1, 1, 1), even) is None
