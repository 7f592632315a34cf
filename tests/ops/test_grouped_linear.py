"""A linear layer per group of rows, against one product a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.grouped_linear import grouped_linear, grouped_weight_gradient, reference

IN, OUT = 5, 3
SIZES = [
    [2, 3, 1],
    [0, 4, 0, 2, 0],  # empty groups at both ends and between
    [0, 6, 0],  # all rows in one group
    [1, 1, 1],
    [7],
    [0, 0, 0],  # no rows at all
]


def problem(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(sizes) + sum(sizes))
    x = torch.randn(sum(sizes), IN, dtype=dtype, generator=generator)
    weight = torch.randn(len(sizes), OUT, IN, dtype=dtype, generator=generator)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return x.requires_grad_(), weight.requires_grad_(), ends


def row_by_row(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    out = x.new_empty(len(x), OUT)
    for row, group in enumerate(groups):
        for feature in range(OUT):
            out[row, feature] = (x[row] * weight[group, feature]).sum()
    return out


@pytest.mark.parametrize("sizes", SIZES)
def test_every_row_meets_its_own_groups_weight(sizes: list[int]) -> None:
    x, weight, ends = problem(sizes)
    expected = row_by_row(x, weight, sizes)
    assert grouped_linear(x, weight, ends).shape == (sum(sizes), OUT)
    torch.testing.assert_close(grouped_linear(x, weight, ends), expected)
    torch.testing.assert_close(reference(x, weight, ends), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients(sizes: list[int]) -> None:
    x, weight, ends = problem(sizes)
    if len(x):
        assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, ends), (x, weight))
    grad_x, grad_weight = torch.autograd.grad(
        grouped_linear(x, weight, ends).square().sum(), (x, weight)
    )
    assert grad_x.shape == x.shape and grad_weight.shape == weight.shape
    empty = torch.tensor(sizes) == 0
    assert (grad_weight[empty] == 0).all() and (grad_weight[~empty] != 0).any(dim=(1, 2)).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_groups_do_not_see_each_other(sizes: list[int]) -> None:
    """Any split of rows gives what each group's rows give alone."""
    x, weight, ends = problem(sizes)
    together = grouped_linear(x, weight, ends)
    for group, (rows, out) in enumerate(zip(x.split(sizes), together.split(sizes), strict=True)):
        torch.testing.assert_close(out, rows @ weight[group].T)


def test_a_gradient_of_any_memory_layout_is_taken() -> None:
    x, weight, ends = problem([2, 3, 1])
    outer = torch.randn(OUT, len(x), dtype=torch.float64).T  # as a transpose's backward gives it
    assert not outer.is_contiguous()
    own = torch.autograd.grad(grouped_linear(x, weight, ends), (x, weight), outer)
    right = torch.autograd.grad(row_by_row(x, weight, [2, 3, 1]), (x, weight), outer)
    for one, other in zip(own, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trained", [0, 1])
def test_one_side_may_be_frozen(trained: int) -> None:
    x, weight, ends = problem([0, 4, 2])
    both = torch.autograd.grad(grouped_linear(x, weight, ends).sum(), (x, weight))
    inputs = [x.detach(), weight.detach()]
    inputs[trained].requires_grad_()
    (alone,) = torch.autograd.grad(grouped_linear(*inputs, ends).sum(), inputs[trained])
    assert torch.equal(alone, both[trained])


def test_rows_of_nobody_reach_nothing() -> None:
    sizes = [2, 0, 3]
    x, weight, ends = problem(sizes)
    longer = torch.cat([x.detach(), torch.full((4, IN), torch.nan, dtype=x.dtype)]).requires_grad_()
    out = grouped_linear(longer, weight, ends)
    assert out.shape == (9, OUT)
    torch.testing.assert_close(out[:5], row_by_row(x, weight, sizes))
    outer = torch.full_like(out, torch.nan)
    outer[:5] = 1
    own = torch.autograd.grad(out, (longer, weight), outer)
    right = torch.autograd.grad(row_by_row(x, weight, sizes).sum(), (x, weight))
    torch.testing.assert_close(own[0][:5], right[0])
    torch.testing.assert_close(own[1], right[1])


CUDA_SIZES = [
    [17, 0, 3, 44],
    [0, 140, 0, 20, 0],  # empty groups at both ends and between
    [63, 1, 64, 65, 127, 129],  # around a step, half a tile and a tile
    [1, 1, 1],
    [7] * 40,
    [0, 4200, 3],  # more than a band of tiles
    [0, 0, 0],
]
CUDA_SHAPES = [(256, 64), (136, 72), (72, 136), (8, 8), (576, 1408), (2816, 104), (60, 32)]
"""Out and in; the last is one that no grouped GEMM takes."""
NOBODYS = 3
"""Rows after the last group's."""
BOUND = 3e-3
"""Of ||out - right|| / ||right||, for 8 bits in a BF16 output."""


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CUDA_SIZES, ids=str)
@pytest.mark.parametrize(("out", "inner"), CUDA_SHAPES)
def test_cuda_agrees(sizes: list[int], out: int, inner: int) -> None:
    x, weight, outer, ends = cuda_problem(sizes, out, inner)
    own = grouped_linear(x, weight, ends)
    assert own.dtype == torch.bfloat16 and own.shape == (len(x), out)
    own_grads = torch.autograd.grad(own, (x, weight), outer)
    agrees((own, *own_grads), x, weight, outer, ends)
    empty = torch.tensor(sizes) == 0
    assert (own_grads[1][empty] == 0).all()


@pytest.mark.gpu
def test_cuda_agrees_for_as_many_groups_as_a_layer_has() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 300, (64,), generator=generator).tolist()
    x, weight, outer, ends = cuda_problem(sizes, 704, 512)
    own = grouped_linear(x, weight, ends)
    agrees((own, *torch.autograd.grad(own, (x, weight), outer)), x, weight, outer, ends)


@pytest.mark.gpu
def test_cuda_takes_a_gradient_of_any_memory_layout() -> None:
    x, weight, outer, ends = cuda_problem([100, 0, 60], 128, 64)
    own = grouped_linear(x, weight, ends)
    plain = torch.autograd.grad(own, (x, weight), outer, retain_graph=True)
    turned = torch.autograd.grad(own, (x, weight), outer.T.contiguous().T)
    assert torch.equal(plain[0][:160], turned[0][:160])
    assert torch.equal(plain[1], turned[1])


@pytest.mark.gpu
def test_cuda_gives_the_same_bits_again() -> None:
    sizes = [1000, 3, 0, 300, 257]
    x, weight, outer, ends = cuda_problem(sizes, 1408, 576)
    x, weight = x.detach(), weight.detach()

    def products() -> tuple[Tensor, ...]:
        out = grouped_linear(x, weight, ends)
        grad_x = grouped_linear(outer, weight.mT, ends)
        grad_weight = grouped_weight_gradient(outer, x, ends)
        return out[: sum(sizes)], grad_x[: sum(sizes)], grad_weight

    first = products()
    for _ in range(20):  # a stage read or overwritten too early would show as bits that change
        assert all(map(torch.equal, products(), first))


def cuda_problem(sizes: list[int], out: int, inner: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, a gradient and ends; rows of nobody are NaN."""
    generator = torch.Generator("cuda").manual_seed(sum(sizes) + out)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    rows = sum(sizes) + NOBODYS
    x, weight, outer = normal(rows, inner), normal(len(sizes), out, inner), normal(rows, out)
    x[-NOBODYS:] = outer[-NOBODYS:] = torch.nan
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    return x.requires_grad_(), weight.requires_grad_(), outer, ends


def agrees(
    own: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor, outer: Tensor, ends: Tensor
) -> None:
    """The product and both gradients, each as a whole, over the rows of groups."""
    rows = int(ends[-1])
    x, weight = (value.detach().double().requires_grad_() for value in (x[:rows], weight))
    product = reference(x, weight, ends)
    right = product, *torch.autograd.grad(product, (x, weight), outer[:rows].double())
    for name, out, expected in zip(("fprop", "dgrad", "wgrad"), own, right, strict=True):
        out = out if name == "wgrad" else out[:rows]
        error, size = (out.double() - expected).norm(), expected.norm()
        assert error <= BOUND * size, f"{name} {error / size:.2e}"
