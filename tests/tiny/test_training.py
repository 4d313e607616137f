import pytest
import torch
from torch import nn

from satune.tiny.training import Muon, orthogonalised


def random_matrices(number, rows, columns):
    return torch.randn(
        number, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


def test_orthogonalised_keeps_directions_and_evens_singular_values():
    matrices = random_matrices(3, 8, 20)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    even = orthogonalised(matrices)
    # In the basis of the original's singular vectors it is diagonal, with values near 1.
    inside = u.mT @ even @ vh.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.68 and values.max() < 1.14
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-10)


def test_orthogonalised_of_one_singular_value_is_the_polynomial():
    # One number 5 is first divided by its norm: x = 1; then x ← 3.4445 x - 4.7750 x³ + 2.0315 x⁵
    # five times: .701, 1.1136..., and so on.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    found = orthogonalised(torch.tensor([[[5.0]]], dtype=torch.float64)).item()
    assert found == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 6)])
def test_muon_moves_against_the_gradient_by_its_rate(shape):
    # Singular values between 1 and 2, so that five steps are enough for all of them.
    u, _, vh = torch.linalg.svd(random_matrices(2, *shape), full_matrices=False)
    gradient = u @ torch.diag(torch.linspace(1, 2, 6, dtype=torch.float64)) @ vh
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    for parameter, g in zip(parameters, gradient, strict=True):
        parameter.grad = g.clone()
    muon = Muon(parameters)
    muon.step(0.1)
    for parameter, g in zip(parameters, gradient, strict=True):
        values = torch.linalg.svdvals(parameter.detach()) / (
            0.1 * max(1, shape[0] / shape[1]) ** 0.5
        )
        assert values.min() > 0.6 and values.max() < 1.14
        assert (parameter.detach() * g).sum() < 0
    # A second gradient of 0 leaves the momentum at work, in the same direction.
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros(shape, dtype=torch.float64)
    muon.step(0.1)
    for parameter, old in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), 2 * old, rtol=1e-4, atol=1e-6)
