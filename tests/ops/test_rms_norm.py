"""RMSNorm against its definition, in every shape and type it is used in."""

from itertools import product

import pytest
import torch
from torch import Tensor

from whalefall.ops.rms_norm import reference, rms_norm

DIM = 6


def problem(*batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(batch))
    x = torch.randn(*batch, DIM, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(DIM, dtype=dtype, generator=generator).requires_grad_()
    return x, weight


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,), (2, 0)])
def test_values_and_gradients(batch: tuple[int, ...]) -> None:
    x, weight = problem(*batch)
    own = rms_norm(x, weight, 0.1)
    expected = torch.zeros_like(x)
    for index in product(*map(range, batch)):
        row = x[index]
        mean_square = sum(value**2 for value in row) / DIM
        expected[index] = row / (mean_square + 0.1).sqrt() * weight
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(reference(x, weight, 0.1), expected)
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))
    grads = torch.autograd.grad(own.sum(), (x, weight))
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]


def test_by_hand() -> None:
    # The mean square of (3, 4, 0, 0) is 6.25, its root 2.5.
    x = torch.tensor([3.0, 4.0, 0.0, 0.0])
    out = rms_norm(x, torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([1.2, 3.2, 0.0, 0.0]))


def test_zeros_stay_zeros() -> None:
    x, weight = torch.zeros(2, DIM).requires_grad_(), torch.ones(DIM)
    out = rms_norm(x, weight, 1e-6)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out == 0).all() and torch.isfinite(grad).all()


def test_bfloat16_is_normed_in_fp32() -> None:
    """Within one rounding of the exact result; gradients have the type of their input."""
    x, weight = problem(50, dtype=torch.bfloat16)
    own, exact = rms_norm(x, weight, 1e-6), reference(x.double(), weight.double(), 1e-6)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.double(), exact, rtol=2**-8, atol=0)
    outer = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    right = torch.autograd.grad(exact, (x, weight), outer.double())
    for grad, other in zip(torch.autograd.grad(own, (x, weight), outer), right, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, other, rtol=2**-7, atol=1e-3)
