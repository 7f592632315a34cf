"""Tokens to experts and back, against loops over tokens and choices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.permute import permute, unpermute

HIDDEN = 4
SHAPES = [(5, 3), (1, 1), (1, 4), (6, 1), (0, 2)]


def problem(tokens: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows, an arbitrary order of the pairs, and a row for each pair."""
    generator = torch.Generator().manual_seed(10 * tokens + top_k)
    like = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(tokens, HIDDEN, **like)
    order = torch.randperm(tokens * top_k, generator=generator)
    rows = torch.randn(tokens * top_k, HIDDEN, **like)
    return x.requires_grad_(), order, rows.requires_grad_()


@pytest.mark.parametrize(("tokens", "top_k"), SHAPES)
def test_permute_copies_the_token_of_each_pair(tokens: int, top_k: int) -> None:
    x, order, _ = problem(tokens, top_k)
    out = permute(x, order, top_k)
    assert out.shape == (tokens * top_k, HIDDEN)
    for row, pair in zip(out, order.tolist(), strict=True):
        assert torch.equal(row, x[pair // top_k])


@pytest.mark.parametrize(("tokens", "top_k"), SHAPES)
def test_unpermute_sums_each_tokens_rows(tokens: int, top_k: int) -> None:
    _, order, rows = problem(tokens, top_k)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for row, pair in zip(rows, order.tolist(), strict=True):
        expected[pair // top_k] = expected[pair // top_k] + row
    torch.testing.assert_close(unpermute(rows, order, top_k), expected)


@pytest.mark.parametrize(("tokens", "top_k"), [shape for shape in SHAPES if shape[0]])
def test_gradients(tokens: int, top_k: int) -> None:
    x, order, rows = problem(tokens, top_k)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, top_k), x)
    assert torch.autograd.gradcheck(lambda r: unpermute(r, order, top_k), rows)


def test_no_tokens_have_empty_gradients() -> None:
    x, order, rows = problem(0, 2)
    for out, value in ((permute(x, order, 2), x), (unpermute(rows, order, 2), rows)):
        (grad,) = torch.autograd.grad(out.sum(), value)
        assert grad.shape == value.shape


@settings(deadline=None)
@given(tokens=st.integers(1, 20), top_k=st.integers(1, 5))
def test_there_and_back_is_top_k_times_the_identity(tokens: int, top_k: int) -> None:
    x, order, _ = problem(tokens, top_k)
    torch.testing.assert_close(unpermute(permute(x, order, top_k), order, top_k), top_k * x)


def test_bfloat16_sums_are_rounded_once() -> None:
    _, order, rows = problem(1, 4)
    low = rows.detach().bfloat16()
    low[order.argsort()] = torch.tensor([256.0, 1.0, 1.0, 1.0]).bfloat16().unsqueeze(1)
    # One by one in BF16, whose step at 256 is 2, each 1 would be lost: 256. Once: 259 to 260.
    assert (unpermute(low, order, 4) == 260).all()
