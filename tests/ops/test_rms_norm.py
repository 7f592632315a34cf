"""RMSNorm against its definition, in every shape and type it is used in."""

from itertools import product

import pytest
import torch
from torch import Tensor

from whalefall.ops.rms_norm import add_rms_norm, reference, rms_norm

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


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 0)])
def test_adding_first(batch: tuple[int, ...]) -> None:
    """The sum and its norm; gradients of both reach both terms."""
    residual, weight = problem(*batch)
    delta = torch.randn_like(residual, requires_grad=True)
    total, normed = add_rms_norm(residual, delta, weight, 0.1)
    assert torch.equal(total, residual + delta)
    torch.testing.assert_close(normed, reference(residual + delta, weight, 0.1))
    if residual.numel():
        inputs = residual, delta, weight
        assert torch.autograd.gradcheck(lambda x, y, w: add_rms_norm(x, y, w, 0.1), inputs)


def test_the_sum_has_the_residuals_type_and_is_rounded_before_it_is_normed() -> None:
    residual, weight = (x.detach() for x in problem(50, dtype=torch.bfloat16))
    delta = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0))
    total, normed = add_rms_norm(residual, delta, weight, 1e-6)
    assert torch.equal(total, (residual.float() + delta).bfloat16())
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))


def relative_error(own: Tensor, right: Tensor) -> float:
    assert own.shape == right.shape
    right = right.detach()
    return float((own.detach().double() - right).norm() / right.norm().clamp_min(1e-30))


GPU_BOUND = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
GPU_SHAPES = [(33, 6), (1000, 512), (2000, 2048), (9, 7168), (0, 8)]


def gpu_problem(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and delta whose rows lie apart, a weight, and a gradient that is none of autograd's own."""
    generator = torch.Generator("cuda").manual_seed(dim)
    like = {"device": "cuda", "generator": generator}
    x, delta, outer = torch.randn(3, rows, dim + 64, **like).to(dtype)[..., :dim]
    weight = torch.randn(dim, **like).to(dtype).requires_grad_()
    return x.requires_grad_(), delta.requires_grad_(), weight, outer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_BOUND)
@pytest.mark.parametrize(("rows", "dim"), GPU_SHAPES)
def test_cuda_agrees_with_the_definition(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, _, weight, outer = gpu_problem(rows, dim, dtype)
    wide = [value.detach().double().requires_grad_() for value in (x, weight)]
    own, right = rms_norm(x, weight, 1e-6), reference(*wide, 1e-6)
    assert own.dtype == dtype and relative_error(own, right) < GPU_BOUND[dtype]
    grads = torch.autograd.grad(own, (x, weight), outer, retain_graph=True)
    right_grads = torch.autograd.grad(right, wide, outer.double())
    for grad, other in zip(grads, right_grads, strict=True):
        assert grad.dtype == dtype and relative_error(grad, other) < GPU_BOUND[dtype]
    again = torch.autograd.grad(own, (x, weight), outer)
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_BOUND)
@pytest.mark.parametrize(("rows", "dim"), GPU_SHAPES)
def test_cuda_adds_first(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, delta, weight, outer = gpu_problem(rows, dim, dtype)
    total, normed = add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    wide = [value.detach().double().requires_grad_() for value in (total, weight)]
    right = reference(*wide, 1e-6)
    assert relative_error(normed, right) < GPU_BOUND[dtype]
    other_outer = outer.flip(0)
    inputs = x, delta, weight
    grads = torch.autograd.grad((total, normed), inputs, (other_outer, outer), retain_graph=True)
    grad_total, grad_weight = torch.autograd.grad(right, wide, outer.double())
    assert torch.equal(grads[0], grads[1])
    assert relative_error(grads[0], grad_total + other_outer) < GPU_BOUND[dtype]
    assert relative_error(grads[2], grad_weight) < GPU_BOUND[dtype]
    # Either output may be all that the loss depends on.
    (alone,) = torch.autograd.grad(normed, x, outer, retain_graph=True)
    assert relative_error(alone, grad_total) < GPU_BOUND[dtype]
    (alone,) = torch.autograd.grad(total, delta, other_outer)
    assert torch.equal(alone, other_outer)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("dtype", GPU_BOUND)
def test_cuda_takes_zeros_and_outliers(value: float, dtype: torch.dtype) -> None:
    x, _, weight, outer = gpu_problem(50, 1536, dtype)
    with torch.no_grad():
        x[::7] = value
        x[3, 100] = value
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    own, right = rms_norm(x, weight, 1e-6), reference(*wide, 1e-6)
    assert relative_error(own, right) < GPU_BOUND[dtype]
    right_grads = torch.autograd.grad(right, wide, outer.double())
    for grad, other in zip(torch.autograd.grad(own, (x, weight), outer), right_grads, strict=True):
        assert relative_error(grad, other) < GPU_BOUND[dtype]
