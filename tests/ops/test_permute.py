"""Tokens to experts and back, against loops over tokens and choices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.permute import gather_sum, permute, sort_by_expert, unpermute

HIDDEN = 4
SHAPES = [(5, 3), (1, 1), (1, 4), (6, 1), (0, 2)]
HERE = [1.0, 0.6, 0.0]
"""Parts of the choices whose experts are here."""


def table(tokens: int, top_k: int, here: float, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Arbitrary places of the choices that are here, and the token of each row."""
    generator = torch.Generator().manual_seed(10 * tokens + top_k)
    choices = torch.randperm(tokens * top_k, generator=generator)
    choices = choices[: round(here * len(choices))]
    places = torch.full((tokens * top_k,), -1).index_put((choices,), torch.arange(len(choices)))
    return places.view(tokens, top_k).to(device), (choices // top_k).int().to(device)


def problem(tokens: int, top_k: int, here: float) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Token rows, a table, and a row for each choice that is here."""
    generator = torch.Generator().manual_seed(10 * tokens + top_k)
    like = {"dtype": torch.float64, "generator": generator}
    x, places = torch.randn(tokens, HIDDEN, **like), table(tokens, top_k, here)
    rows = torch.randn(len(places[1]), HIDDEN, **like)
    return x.requires_grad_(), places, rows.requires_grad_()


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda top_k: st.lists(st.lists(st.integers(0, 6), min_size=top_k, max_size=top_k))
    )
)
def test_pairs_are_sorted_by_expert_and_then_by_token(choices: list[list[int]]) -> None:
    experts = torch.tensor(choices, dtype=torch.int64).view(len(choices), -1 if choices else 2)
    pairs = [expert for token in choices for expert in token]
    order = sorted(range(len(pairs)), key=lambda pair: (pairs[pair], pair))
    places, row_tokens = sort_by_expert(experts, 7)
    assert places.shape == experts.shape and places.dtype == torch.int64
    assert [order.index(pair) for pair in range(len(pairs))] == places.flatten().tolist()
    assert row_tokens.dtype == torch.int32
    assert row_tokens.tolist() == [pair // experts.shape[1] for pair in order]


@pytest.mark.parametrize("here", HERE)
@pytest.mark.parametrize(("tokens", "top_k"), SHAPES)
def test_permute_copies_a_token_to_the_places_of_its_choices(
    tokens: int, top_k: int, here: float
) -> None:
    x, (places, row_tokens), rows = problem(tokens, top_k, here)
    out = permute(x, places, row_tokens)
    assert out.shape == rows.shape
    for token, of_token in enumerate(places.tolist()):
        for row in of_token:
            assert row < 0 or torch.equal(out[row], x[token])


@pytest.mark.parametrize("here", HERE)
@pytest.mark.parametrize(("tokens", "top_k"), SHAPES)
def test_unpermute_sums_each_tokens_rows(tokens: int, top_k: int, here: float) -> None:
    _, (places, row_tokens), rows = problem(tokens, top_k, here)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token, of_token in enumerate(places.tolist()):
        for row in of_token:
            if row >= 0:
                expected[token] = expected[token] + rows[row]
    torch.testing.assert_close(unpermute(rows, places, row_tokens), expected)
    torch.testing.assert_close(gather_sum(rows, places), expected)


@pytest.mark.parametrize("here", HERE)
@pytest.mark.parametrize(("tokens", "top_k"), [shape for shape in SHAPES if shape[0]])
def test_gradients(tokens: int, top_k: int, here: float) -> None:
    x, places, rows = problem(tokens, top_k, here)
    assert torch.autograd.gradcheck(lambda x: permute(x, *places), x)
    assert torch.autograd.gradcheck(lambda r: unpermute(r, *places), rows)


def test_no_tokens_have_empty_gradients() -> None:
    x, places, rows = problem(0, 2, 1.0)
    for out, value in ((permute(x, *places), x), (unpermute(rows, *places), rows)):
        (grad,) = torch.autograd.grad(out.sum(), value)
        assert grad.shape == value.shape


@settings(deadline=None)
@given(tokens=st.integers(1, 20), top_k=st.integers(1, 5))
def test_there_and_back_is_top_k_times_the_identity(tokens: int, top_k: int) -> None:
    x, places, _ = problem(tokens, top_k, 1.0)
    torch.testing.assert_close(unpermute(permute(x, *places), *places), top_k * x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_nobody_are_in_no_sum(device: str) -> None:
    """Where only the device knows how many rows there are, there is room for more."""
    places = torch.tensor([[1, -1], [-1, -1], [2, 0]], device=device)
    row_tokens = torch.tensor([2, 0, 2, 0, 0], dtype=torch.int32, device=device)
    x = torch.arange(1.0, 4.0, device=device).unsqueeze(1).requires_grad_()
    rows = permute(x, places, row_tokens)
    assert rows[:3].flatten().tolist() == [3, 1, 3]
    assert unpermute(rows, places, row_tokens).flatten().tolist() == [1, 0, 6]
    outer = torch.tensor([1.0, 10.0, 100.0, torch.nan, torch.nan], device=device).unsqueeze(1)
    (grad,) = torch.autograd.grad(rows, x, outer)
    assert grad.flatten().tolist() == [10, 0, 101]


def rows_of_one_token(device: str) -> tuple[Tensor, Tensor]:
    """256, 1, 1 and 1 in the order of the choices, which is not the order of the rows."""
    places = torch.tensor([[2, 0, 3, 1]], device=device)
    rows = torch.tensor([1.0, 1.0, 256.0, 1.0], device=device).bfloat16().unsqueeze(1)
    return rows.expand(4, HIDDEN), places


def test_bfloat16_sums_are_rounded_once() -> None:
    # One by one in BF16, whose step at 256 is 2, each 1 would be lost: 256. Once: 259 to 260.
    assert (gather_sum(*rows_of_one_token("cpu")) == 260).all()


@pytest.mark.gpu
def test_cuda_sums_are_rounded_once() -> None:
    assert (gather_sum(*rows_of_one_token("cuda")) == 260).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n_experts", [1, 7, 64, 256, 1024])
@pytest.mark.parametrize("skew", [0.0, 0.95, 1.0], ids=["even", "skewed", "one expert"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (128, 1), (1001, 6), (0, 2)])
def test_cuda_sorts_as_the_cpu_does(n_experts: int, skew: float, tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(n_experts)
    experts = torch.randint(n_experts, (tokens, top_k), generator=generator)
    favoured = torch.rand(tokens, top_k, generator=generator) < skew
    experts = experts.where(~favoured, n_experts - 1)
    own, right = sort_by_expert(experts.cuda(), n_experts), sort_by_expert(experts, n_experts)
    for one, other in zip(own, right, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [1, 48, 333, 2048, 7168])
@pytest.mark.parametrize("here", HERE)
@pytest.mark.parametrize(("tokens", "top_k"), [(65, 6), (1, 8), (3, 1), (0, 2)])
def test_cuda_agrees(tokens: int, top_k: int, here: float, hidden: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "dtype": dtype, "generator": generator}
    places, x = table(tokens, top_k, here, "cuda"), torch.randn(tokens, hidden, **like)
    rows = torch.randn(len(places[1]), hidden, **like)
    rows[: top_k // 2] *= 1e4
    bound = 3e-3 if dtype == torch.bfloat16 else 1e-6
    for operation, source, outer in ((permute, x, rows), (unpermute, rows, x)):
        source = source.clone().requires_grad_()
        exact = source.detach().cpu().double().requires_grad_()
        own, right = operation(source, *places), operation(exact, *(t.cpu() for t in places))
        (own_grad,) = torch.autograd.grad(own, source, outer)
        (right_grad,) = torch.autograd.grad(right, exact, outer.cpu().double())
        for one, other in ((own, right), (own_grad, right_grad)):
            assert one.dtype == dtype and one.shape == other.shape
            assert (one.cpu().double() - other).norm() <= bound * other.norm()
    assert torch.equal(permute(x, *places), x[places[1]])


@pytest.mark.gpu
def test_cuda_takes_gradients_of_any_memory_layout() -> None:
    x = torch.randn(9, 64, device="cuda").requires_grad_()
    places = table(9, 2, 1.0, "cuda")
    outer = torch.randn(64, 18, device="cuda").T
    (own,) = torch.autograd.grad(permute(x, *places), x, outer)
    (right,) = torch.autograd.grad(permute(x, *places), x, outer.contiguous())
    assert torch.equal(own, right)
