"""Decoding on a CPU, and training between its products: by Numba and by torch's calls."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from whalefall.ops import (
    absorb,
    few_rows,
    function,
    gate,
    latent_attention,
    linear,
    merge_norm,
    mla_latents,
    rms_norm,
    route,
    silu_mul,
    swiglu,
)
from whalefall.ops.block_linear import streamed_linear
from whalefall.ops.decode_places import advance, decode_places
from whalefall.ops.few_rows import Weight

TOKENS = [0, 1, 2, 3, 4, 5, 7, 16]
randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, params=["compiled", "by torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(function, "_HAS_NUMBA", request.param == "compiled")
    with torch.inference_mode():
        yield request.param


def close(found: Tensor, right: Tensor, bound: float = 1e-5) -> None:
    """Within ``bound`` of the largest number there is."""
    assert found.dtype == torch.float32 and found.shape == right.shape
    if right.numel():
        assert (found - right).abs().max() <= bound * right.abs().max()


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [
        None if x is None else x.to(torch.complex128 if x.is_complex() else torch.float64)
        for x in tensors
    ]


def turns(tokens: int, half: int) -> Tensor:
    return torch.polar(torch.ones(tokens, half), randn(tokens, half) * 9)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 20), (64, 48), (129, 100)])
def test_linear(tokens: int, sizes: tuple[int, int]) -> None:
    outer, inner = sizes
    x, weight = randn(tokens, inner), randn(outer, inner)
    close(linear.linear(x, weight), x.double() @ weight.double().T)


def test_linear_of_strided_rows_and_of_batches() -> None:
    x, weight = randn(6, 40), randn(5, 20)
    close(linear.linear(x[:, 20:], weight), x[:, 20:].double() @ weight.double().T)
    batch = x.view(2, 3, 2, 20)
    close(linear.linear(batch, weight), batch.double() @ weight.double().T)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_norms(tokens: int, scale: float) -> None:
    x, delta, weight = randn(tokens, 48) * scale, randn(tokens, 48) * scale, randn(48)
    close(rms_norm.rms_norm(x, weight, 1e-6), rms_norm.reference(*doubles(x, weight), 1e-6))
    total, normed = rms_norm.add_rms_norm(x, (delta,), weight, 1e-6)
    right = x.double() + delta.double()
    close(total, right)
    close(normed, rms_norm.reference(right, weight.double(), 1e-6))


def gradients(run: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum of the result."""
    with torch.inference_mode(False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_a_norm(tokens: int, scale: float, strided: bool) -> None:
    x, weight = randn(tokens, 80) * scale, randn(48)

    def run(norm: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return norm(x[:, 32:] if strided else x[:, 32:].contiguous(), weight, 1e-6)

    found = gradients(partial(run, rms_norm.rms_norm), x, weight)
    right = gradients(partial(run, rms_norm.reference), *doubles(x, weight))
    for mine, theirs in zip(found, right, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_gradients_of_swiglu(tokens: int, scale: float) -> None:
    """Also far out, where the exponential ends."""
    joint, weights = randn(tokens, 46) * scale, randn(tokens)
    for inputs in ((joint,), (joint, weights)):
        found = gradients(swiglu.swiglu, *inputs)
        right = gradients(swiglu.reference, *doubles(*inputs))
        for mine, theirs in zip(found, right, strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("with_shared", [True, False])
def test_merge_norm(tokens: int, with_shared: bool) -> None:
    residual, rows, weight = randn(tokens, 48), randn(3 * tokens, 48), randn(48)
    places = torch.randperm(3 * tokens).view(tokens, 3)
    shared = randn(tokens, 48) if with_shared else None
    found = merge_norm.merge_norm(residual, rows, places, shared, weight, 1e-6)
    residual, rows, shared, weight = doubles(residual, rows, shared, weight)
    right = merge_norm.reference(residual, rows, places, shared, weight, 1e-6)
    for mine, theirs in zip(found, right, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("tokens", TOKENS[1:])
@pytest.mark.parametrize("q_lora", [24, 0])
def test_mla_latents_fill_their_places_and_no_other(tokens: int, q_lora: int) -> None:
    joint, rotation = randn(tokens, q_lora + 16 + 8), turns(tokens, 4)
    q_weight, kv_weight = randn(q_lora) if q_lora else None, randn(16)
    store, slots = torch.full((3, 64, 24), 7.0), torch.randperm(192)[:tokens]
    found = mla_latents.mla_latents(joint, q_weight, kv_weight, rotation, store, slots)
    query, entries = mla_latents.reference(*doubles(joint, q_weight, kv_weight, rotation))
    close(store.view(-1, 24)[slots], entries)
    store.view(-1, 24)[slots] = 7.0
    assert (store == 7).all()
    assert (found is None) == (query is None)
    if found is not None:
        close(found, query)


@pytest.mark.parametrize("tokens", TOKENS)
def test_absorption(tokens: int) -> None:
    q, rotation, kv_b = randn(tokens, 3, 12 + 8), turns(tokens, 4), randn(3, 12 + 10, 16)
    w_uk, w_uv = kv_b.split_with_sizes([12, 10], 1)  # views, as the network has them
    close(
        absorb.absorb_query(q, rotation, w_uk), absorb.absorb_reference(*doubles(q, rotation, w_uk))
    )
    mixed = randn(tokens, 3, 16)
    close(absorb.unfold_values(mixed, w_uv), absorb.unfold_reference(*doubles(mixed, w_uv)))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_latent_attention(rows: int, width: int, scale: float) -> None:
    """Also of the first token of all, with all but one key out of sight, and sharply peaked."""
    store = randn(4 * rows, 64, 24)
    pages = torch.randperm(4 * rows).view(rows, 4).int()
    lengths = torch.tensor([0, 1, 62, 63, 200][:rows], dtype=torch.int32)
    q = randn(rows, width, 3, 24)
    found = latent_attention.latent_attention(q, store, pages, lengths, value_dim=16, scale=scale)
    right = latent_attention.reference(
        *doubles(q, store), pages, lengths, value_dim=16, scale=scale
    )
    close(found, right, 1e-4 if scale > 1 else 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("normalize", [True, False])
def test_gate(tokens: int, groups: tuple[int, int], normalize: bool) -> None:
    x, weight, bias = randn(tokens, 48), randn(16, 48) * 0.3, randn(16) * 0.5 - 1
    options = {"top_k": 3, "n_group": groups[0], "topk_group": groups[1], "scale": 2.5}
    found = gate.gate(x, weight, bias, norm_topk_prob=normalize, **options)
    logits = x.double() @ weight.double().T
    experts, weights, _, loads = route.route(
        logits, bias.double(), norm_topk_prob=normalize, **options
    )
    chosen, order = found.experts.sort(1)
    right, right_order = experts.sort(1)
    assert torch.equal(chosen, right)
    close(found.weights.gather(1, order), weights.gather(1, right_order))
    assert torch.equal(found.ends, loads.cumsum(0).int())
    # Each choice has a row of its expert, rows of an expert in the order of their tokens.
    starts = found.ends - loads
    for token in range(tokens):
        for choice, place in enumerate(found.places[token].tolist()):
            expert = found.experts[token, choice]
            assert starts[expert] <= place < found.ends[expert]
            assert found.row_tokens[place] == token
            assert found.row_weights[place] == found.weights[token, choice]
    for start, end in zip(starts.tolist(), found.ends.tolist(), strict=True):
        assert found.row_tokens[start:end].diff().gt(0).all()


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("with_shared", [True, False])
def test_few_rows(tokens: int, with_shared: bool) -> None:
    """With experts that have no row, one and many."""
    experts = torch.randint(0, 5, (tokens, 2)) + (torch.rand(tokens, 2) > 0.5).long()
    row_tokens = experts.flatten().argsort(stable=True) // 2
    ends = experts.flatten().bincount(minlength=7).cumsum(0).int()
    row_weights, groups = randn(2 * tokens), 7 + with_shared
    x, up, down = randn(tokens, 48), randn(groups, 40, 48), randn(groups, 48, 20)
    found = few_rows.few_rows(x, row_tokens, row_weights, ends, Weight(up), Weight(down))
    right = few_rows.reference(
        x.double(),
        row_tokens,
        row_weights.double(),
        ends,
        Weight(up.double()),
        Weight(down.double()),
    )
    close(found, right)


def test_places_and_the_way_on() -> None:
    slots = torch.tensor([4, 0, 2])
    lengths = torch.tensor([63, 0, 130, 0, 5, 0], dtype=torch.int32)
    tokens, pages = torch.arange(12).view(6, 2), torch.arange(18, dtype=torch.int32).view(6, 3)
    rotation = turns(192, 4)
    places = decode_places(slots, lengths, tokens, pages, rotation)
    assert places.tokens.tolist() == [[8, 9], [0, 1], [4, 5]]
    assert places.lengths.tolist() == [5, 63, 130] and places.positions.tolist() == [6, 64, 131]
    assert torch.equal(places.pages, pages[slots])
    in_page = [12 * 64 + 5, 12 * 64 + 6, 63, 64, 8 * 64 + 2, 8 * 64 + 3]
    assert places.entries.tolist() == in_page
    assert torch.equal(places.rotation, rotation[[5, 6, 63, 64, 130, 131]])
    chosen, accepted = torch.tensor([[20, 21], [22, 23], [24, 25]]), torch.tensor([1, 0, 1])
    last = advance(slots, lengths, tokens, places.positions, chosen, accepted)
    assert last.tolist() == [[21], [22], [25]]
    assert lengths.tolist() == [64, 0, 132, 0, 7, 0]
    assert tokens.tolist() == [[22, 1], [2, 3], [25, 5], [6, 7], [21, 9], [10, 11]]


def test_gradients_take_the_other_way() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        weight = randn(5, 8).requires_grad_()
        linear.linear(randn(2, 8), weight).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize("tokens", TOKENS)
def test_swiglu(tokens: int) -> None:
    """Also far out, where the exponential ends."""
    joint, weights = randn(tokens, 46) * 60, randn(tokens)
    close(swiglu.swiglu(joint), swiglu.reference(joint.double()))
    close(swiglu.swiglu(joint, weights), swiglu.reference(joint.double(), weights.double()))
    gate_half, up = joint.chunk(2, 1)
    close(silu_mul.silu_mul(gate_half, up), silu_mul.reference(gate_half.double(), up.double()))


def test_one_by_one_a_row_has_the_same_bits_in_any_company(form: str) -> None:
    if form != "compiled":
        pytest.skip("the library's rows depend on their number")
    x, weight = randn(7, 100), Weight(randn(33, 100))
    together = streamed_linear(x, weight, 1)
    assert torch.equal(together, torch.cat([streamed_linear(row, weight, 1) for row in x.split(1)]))
    up, down = Weight(randn(3, 40, 100)), Weight(randn(3, 100, 20))
    row_tokens, ends = torch.tensor([0, 1, 2, 3, 5, 6, 4]), torch.tensor([4, 6, 7]).int()
    ones = torch.ones(7)
    many = few_rows.few_rows(x, row_tokens, ones, ends, up, down, block_rows=1)
    for row, token in enumerate(row_tokens.tolist()):
        own = x[token : token + 1]
        expert = int((ends <= row).sum())
        alone = torch.tensor([int(e >= expert) for e in range(3)]).int()
        zero = torch.zeros(1, dtype=torch.int64)
        single = few_rows.few_rows(own, zero, ones[:1], alone, up, down, block_rows=1)
        assert torch.equal(many[row : row + 1], single)


def test_what_has_no_plain_memory_takes_the_other_way() -> None:
    """Other strides, types and shapes than kernels read give what the library gives."""
    x, weight = randn(3, 64), randn(64, 96)
    right = x.double() @ weight.double()
    close(linear.linear(x, weight.T), right)
    close(linear.linear(x, randn(96, 128)[:, ::2].copy_(weight.T)), right)
    assert linear.linear(x.to("meta"), weight.T.to("meta")).shape == (3, 96)
    delta = randn(1, 64).expand(3, -1)
    total, _ = rms_norm.add_rms_norm(x, (delta,), randn(64), 1e-6)
    assert total.shape == x.shape
    column_major = randn(48, 3).T
    close(
        rms_norm.rms_norm(column_major, torch.ones(48), 1e-6),
        rms_norm.reference(column_major.double(), torch.ones(48).double(), 1e-6),
    )


def test_integers_may_be_of_either_width() -> None:
    slots, lengths = torch.tensor([2, 0]), torch.tensor([3, 0, 70], dtype=torch.int32)
    tokens, pages = torch.arange(6).view(3, 2), torch.arange(9, dtype=torch.int32).view(3, 3)
    places = decode_places(slots, lengths, tokens, pages, turns(192, 4))
    for part, narrow in zip(
        places, decode_places(slots.int(), lengths, tokens, pages, turns(192, 4)), strict=True
    ):
        assert part.shape == narrow.shape
    chosen, accepted = torch.tensor([[7, 8], [9, 10]]), torch.tensor([1, 0])
    for kind in (torch.int32, torch.int64):
        own_lengths, own_tokens = lengths.clone(), tokens.clone()
        own = accepted.to(kind) if kind == torch.int64 else accepted
        last = advance(slots.to(kind), own_lengths, own_tokens, places.positions, chosen, own)
        assert last.tolist() == [[8], [9]] and own_lengths.tolist() == [4, 0, 72]
    q, store = randn(1, 1, 3, 24), randn(4, 64, 24)
    options = {"value_dim": 16, "scale": 0.2}
    lengths, pages = torch.tensor([99], dtype=torch.int32), torch.tensor([[2, 0]]).int()
    wanted = latent_attention.reference(q.double(), store.double(), pages, lengths, **options)
    close(latent_attention.latent_attention(q, store, pages, lengths, **options), wanted)
