"""RMSNorm against its definition, in every shape and type it is used in."""

from itertools import product

import pytest
import torch
from torch import Tensor

from whalefall.ops.rms_norm import add_rms_norm, add_up, reference, rms_norm

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
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_adding_first(batch: tuple[int, ...], count: int) -> None:
    """The sum and its norm; gradients of both reach every term."""
    residual, weight = problem(*batch)
    deltas = [torch.randn_like(residual, requires_grad=True) for _ in range(count)]
    total, normed = add_rms_norm(residual, deltas, weight, 0.1)
    torch.testing.assert_close(total, sum(deltas, start=residual))
    assert torch.equal(add_up(residual, *deltas), total)
    torch.testing.assert_close(normed, reference(total, weight, 0.1))
    if residual.numel():
        inputs = weight, residual, *deltas
        assert torch.autograd.gradcheck(lambda w, x, *ys: add_rms_norm(x, ys, w, 0.1), inputs)


def test_every_use_has_the_norm_and_their_gradients_add_up() -> None:
    residual, weight = problem(3)
    deltas = [torch.randn_like(residual, requires_grad=True) for _ in range(2)]
    _, *uses = add_rms_norm(residual, deltas, weight, 0.1, uses=3)
    _, once = add_rms_norm(residual, deltas, weight, 0.1)
    assert len(uses) == 3 and all(torch.equal(use, once) for use in uses)
    outer = torch.randn(3, *once.shape, dtype=once.dtype)
    inputs = weight, residual, *deltas
    expected = torch.autograd.grad(once, inputs, outer.sum(0))
    for own, right in zip(torch.autograd.grad(uses, inputs, list(outer)), expected, strict=True):
        torch.testing.assert_close(own, right)


def test_the_sum_has_the_residuals_type_and_is_rounded_once_before_it_is_normed() -> None:
    residual, weight = (x.detach() for x in problem(50, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(2, 50, DIM, generator=generator)
    deltas = [deltas[0], deltas[1].bfloat16()]
    total, normed = add_rms_norm(residual, deltas, weight, 1e-6)
    assert torch.equal(total, (residual.float() + deltas[0] + deltas[1].float()).bfloat16())
    assert torch.equal(add_up(residual, *deltas), total)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))


def relative_error(own: Tensor, right: Tensor) -> float:
    assert own.shape == right.shape
    right = right.detach()
    return float((own.detach().double() - right).norm() / right.norm().clamp_min(1e-30))


GPU_BOUND = {torch.bfloat16: 3e-3, torch.float32: 1e-5}
GPU_SHAPES = [(33, 6), (1000, 512), (2000, 2048), (9, 7168), (0, 8)]


def gpu_random(count: int, rows: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Matrices whose rows lie apart."""
    generator = torch.Generator("cuda").manual_seed(dim)
    whole = torch.randn(count, rows, dim + 64, device="cuda", generator=generator).to(dtype)
    return list(whole[..., :dim])


def gpu_problem(rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight, and a gradient that is none of autograd's own."""
    x, outer = gpu_random(2, rows, dim, dtype)
    (weight,) = gpu_random(1, 1, dim, dtype)
    return x.requires_grad_(), weight[0].clone().requires_grad_(), outer


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_BOUND)
@pytest.mark.parametrize(("rows", "dim"), GPU_SHAPES)
def test_cuda_agrees_with_the_definition(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, weight, outer = gpu_problem(rows, dim, dtype)
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
@pytest.mark.parametrize(("count", "uses"), [(0, 2), (1, 1), (1, 3), (2, 2), (3, 4)])
def test_cuda_adds_first(rows: int, dim: int, dtype: torch.dtype, count: int, uses: int) -> None:
    """``count`` deltas before the norm, the gradients of ``uses`` readers after it."""
    _, weight, _ = gpu_problem(rows, dim, dtype)
    terms, outer = (gpu_random(n, rows, dim, dtype) for n in (1 + count, 1 + uses))
    outer[1] = outer[1].contiguous()  # strides of their own
    terms = [term.requires_grad_() for term in terms]
    total, *normed = add_rms_norm(terms[0], terms[1:], weight, 1e-6, uses)
    assert torch.equal(total, sum(term.float() for term in terms).to(dtype))
    assert torch.equal(add_up(*terms), total)
    wide = [value.detach().double().requires_grad_() for value in (total, weight)]
    right = reference(*wide, 1e-6)
    assert len(normed) == uses
    for use in normed:
        assert use.dtype == dtype and relative_error(use, right) < GPU_BOUND[dtype]

    inputs, outputs = (*terms, weight), (total, *normed)
    grads = torch.autograd.grad(outputs, inputs, outer, retain_graph=True)
    of_norms = sum(grad.double() for grad in outer[1:])
    grad_total, grad_weight = torch.autograd.grad(right, wide, of_norms, retain_graph=True)
    assert all(torch.equal(grad, grads[0]) for grad in grads[:-1])
    assert relative_error(grads[0], grad_total + outer[0].double()) < GPU_BOUND[dtype]
    assert relative_error(grads[-1], grad_weight) < GPU_BOUND[dtype]
    again = torch.autograd.grad(outputs, inputs, outer, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))

    # Any output may be all that the loss depends on.
    (alone,) = torch.autograd.grad(normed[-1], terms[-1], outer[-1], retain_graph=True)
    (right_alone,) = torch.autograd.grad(right, wide[:1], outer[-1].double())
    assert relative_error(alone, right_alone) < GPU_BOUND[dtype]
    (alone,) = torch.autograd.grad(total, terms[-1], outer[0])
    assert torch.equal(alone, outer[0])


@pytest.mark.gpu
def test_cuda_takes_long_rows_and_many_gradients() -> None:
    """More than shared memory has room for at once: fewer are on their way, or none."""
    for dim in (8192, 16384):
        x, weight, _ = gpu_problem(5, dim, torch.float32)
        outer = gpu_random(6, 5, dim, torch.float32)
        wide = [value.detach().double().requires_grad_() for value in (x, weight)]
        outputs = add_rms_norm(x, (), weight, 1e-6, uses=5)
        grads = torch.autograd.grad(outputs, (x, weight), outer)
        right = reference(*wide, 1e-6)
        of_norm = sum(grad.double() for grad in outer[1:])
        right_x, right_weight = torch.autograd.grad(right, wide, of_norm)
        assert relative_error(grads[0], right_x + outer[0].double()) < 1e-5
        assert relative_error(grads[1], right_weight) < 1e-5


@pytest.mark.gpu
def test_cuda_sees_a_change_in_place() -> None:
    """The uses share their memory, and autograd knows."""
    x, weight, _ = gpu_problem(4, 8, torch.float32)
    _, first, second = add_rms_norm(x, (), weight, 1e-6, uses=2)
    loss = first.square().sum()
    with torch.no_grad():
        second.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, 1e4])
@pytest.mark.parametrize("dtype", GPU_BOUND)
def test_cuda_takes_zeros_and_outliers(value: float, dtype: torch.dtype) -> None:
    x, weight, outer = gpu_problem(50, 1536, dtype)
    with torch.no_grad():
        x[::7] = value
        x[3, 100] = value
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    own, right = rms_norm(x, weight, 1e-6), reference(*wide, 1e-6)
    assert relative_error(own, right) < GPU_BOUND[dtype]
    right_grads = torch.autograd.grad(right, wide, outer.double())
    for grad, other in zip(torch.autograd.grad(own, (x, weight), outer), right_grads, strict=True):
        assert relative_error(grad, other) < GPU_BOUND[dtype]
