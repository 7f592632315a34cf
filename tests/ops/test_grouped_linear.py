"""A linear layer per group of rows, against one product a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.grouped_linear import grouped_linear, reference

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


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [[17, 0, 3, 44], [0, 64, 0], [0, 0, 0]])
@pytest.mark.parametrize("width", [64, 60], ids=["aligned", "unaligned"])
def test_cuda_agrees_and_leaves_empty_groups_zero(sizes: list[int], width: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    x = torch.randn(sum(sizes), width, **like).requires_grad_()
    weight = torch.randn(len(sizes), 32, width, **like).requires_grad_()
    ends = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    own = grouped_linear(x, weight, ends)
    right = reference(x.double(), weight.double(), ends)
    torch.testing.assert_close(own.double(), right, rtol=1e-2, atol=5e-2)
    outer = torch.randn(own.shape, **like)
    for one, other in zip(
        torch.autograd.grad(own, (x, weight), outer),
        torch.autograd.grad(right, (x, weight), outer.double()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-1)
