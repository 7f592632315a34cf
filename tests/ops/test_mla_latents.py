"""A decode step's latents: norms, turn and cache entry, against the definition."""

import pytest
import torch
from torch import Tensor

from whalefall.ops.latent_attention import decode_latents, encode_latents, encoded_size
from whalefall.ops.mla_latents import mla_latents, reference
from whalefall.ops.rope import rotations

PAGES, PAGE = 6, 8


def problem(
    tokens: int, query: int, latent: int, rope: int, device: str = "cpu"
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The joint product is the end of longer rows."""
    generator = torch.Generator().manual_seed(tokens + query)
    joint = torch.randn(tokens, 8 + query + latent + rope, generator=generator)[:, 8:]
    q_weight = torch.randn(query, generator=generator) if query else None
    kv_weight = torch.randn(latent, generator=generator)
    positions = torch.randint(4096, (tokens,), generator=generator)
    rotation = rotations(positions, torch.rand(rope // 2, generator=generator), 1.2)
    parts = (joint, q_weight, kv_weight, rotation)
    return tuple(part if part is None else part.to(device) for part in parts)


def slots_of(tokens: int, device: str = "cpu") -> Tensor:
    return torch.randperm(PAGES * PAGE, generator=torch.Generator().manual_seed(0))[:tokens].to(
        device
    )


@pytest.mark.parametrize("sizes", [(5, 24, 16, 8), (1, 24, 16, 8), (3, 0, 16, 4), (0, 24, 16, 8)])
def test_queries_are_returned_and_entries_stored(sizes: tuple[int, ...]) -> None:
    inputs, slots = problem(*sizes), slots_of(sizes[0])
    store = torch.full((PAGES, PAGE, sizes[2] + sizes[3]), 7.0)
    query = mla_latents(*inputs, store, slots)
    right, entries = reference(*inputs)
    assert (query is None) == (right is None)
    if right is not None:
        torch.testing.assert_close(query, right)
    expected = torch.full_like(store, 7.0).flatten(0, 1)
    expected[slots] = entries
    torch.testing.assert_close(store.flatten(0, 1), expected)


def test_by_hand() -> None:
    # Root mean squares 5 / sqrt(2) and 2; a quarter turn of the pair (1, 2) is (-2, 1).
    joint = torch.tensor([[3.0, 4.0, 2.0, 2.0, 1.0, 2.0]])
    store = torch.zeros(1, 1, 4)
    query = mla_latents(
        joint, torch.ones(2), torch.tensor([1.0, 3.0]), torch.tensor([[1j]]), store,
        torch.tensor([0]), eps=0.0,
    )  # fmt: skip
    torch.testing.assert_close(query, torch.tensor([[0.6, 0.8]]) * 2**0.5)
    torch.testing.assert_close(store[0, 0], torch.tensor([1.0, 3.0, -2.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 24, 16, 8), (3, 0, 192, 4), (1, 8, 512, 64), (0, 8, 16, 8)])
def test_fp8_entries_are_encoded(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """The numbers of an entry as a plain store has them in the type of the latents."""
    *parts, rotation = problem(*sizes)
    parts = [part if part is None else part.to(dtype) for part in parts]
    tokens, _, latent, rope = sizes
    slots, size = slots_of(tokens), encoded_size(latent + rope, latent)
    store = torch.full((PAGES, PAGE, size), 7, dtype=torch.uint8)
    plain = torch.zeros(PAGES, PAGE, latent + rope, dtype=dtype)
    query = mla_latents(*parts, rotation, store, slots)
    right = mla_latents(*parts, rotation, plain, slots)
    assert (query is None and right is None) or torch.equal(query, right)
    expected = torch.full_like(store, 7).flatten(0, 1)
    expected[slots] = encode_latents(plain.flatten(0, 1)[slots], latent)
    assert torch.equal(store.flatten(0, 1), expected)


def test_fp8_entries_where_plain_ones_are_compiled() -> None:
    """Sums in another order may turn the last bit of a scale or a number: 1/8 of it at most."""
    inputs, slots = problem(5, 24, 16, 8), slots_of(5)
    store = torch.zeros(PAGES, PAGE, encoded_size(24, 16), dtype=torch.uint8)
    with torch.no_grad():
        query = mla_latents(*inputs, store, slots)
    right, entries = reference(*inputs)
    torch.testing.assert_close(query, right)
    found = decode_latents(store.flatten(0, 1)[slots], 16)
    expected = decode_latents(encode_latents(entries, 16), 16)
    torch.testing.assert_close(found, expected, rtol=1 / 8, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1536, 512, 64), (33, 1536, 512, 64), (9, 0, 512, 64), (4, 33, 48, 6), (0, 8, 8, 4)],
)
def test_cuda_agrees_with_the_definition(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    *parts, rotation = problem(*sizes, device="cuda")
    parts = [part if part is None else part.to(dtype) for part in parts]
    slots = slots_of(sizes[0], "cuda")
    store = torch.full((PAGES, PAGE, sizes[2] + sizes[3]), 7.0, device="cuda", dtype=dtype)
    query = mla_latents(*parts, rotation, store, slots)
    exact = [part if part is None else part.double() for part in parts]
    right, entries = reference(*exact, rotation)
    bound = 3e-3 if dtype == torch.bfloat16 else 1e-6
    rows = store.flatten(0, 1)
    for own, other in ((query, right), (rows[slots], entries)):
        assert (own is None) == (other is None)
        if own is not None:
            assert own.dtype == dtype and own.shape == other.shape
            assert (own.double() - other).norm() <= bound * other.norm()
    untouched = torch.ones(len(rows), dtype=torch.bool, device="cuda").index_fill_(0, slots, False)
    assert (rows[untouched] == 7).all()


@pytest.mark.gpu
def test_cuda_does_not_store_what_has_no_slot() -> None:
    *parts, rotation = problem(3, 24, 16, 8, device="cuda")
    store = torch.zeros(PAGES, PAGE, 24, device="cuda")
    query = mla_latents(*parts, rotation, store, torch.tensor([5, -1, 2], device="cuda"))
    right, entries = reference(*parts, rotation)
    torch.testing.assert_close(query, right)
    torch.testing.assert_close(store.flatten(0, 1)[[5, 2]], entries[[0, 2]])
    assert store.count_nonzero() == 2 * 24


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1536, 512, 64), (33, 1536, 512, 64), (9, 0, 512, 64), (4, 33, 192, 6), (5, 24, 16, 8)],
)
def test_cuda_encodes_fp8_entries(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bytes of the plain form on a CPU; what has no slot is not stored."""
    *parts, rotation = problem(*sizes, device="cuda")
    parts = [part if part is None else part.to(dtype) for part in parts]
    tokens, query, latent, rope = sizes
    parts[0][0, query + 3] = 1e4
    parts[0][1:2] = 0
    slots, size = slots_of(tokens, "cuda"), encoded_size(latent + rope, latent)
    slots[2:3] = -1
    store = torch.full((PAGES, PAGE, size), 7, dtype=torch.uint8, device="cuda")
    plain = torch.zeros(PAGES, PAGE, latent + rope, dtype=dtype, device="cuda")
    found = mla_latents(*parts, rotation, store, slots)
    right = mla_latents(*parts, rotation, plain, slots)
    assert (found is None and right is None) or torch.equal(found, right)
    slots, plain = slots[slots >= 0].cpu(), plain.flatten(0, 1).cpu()
    expected = torch.full(store.shape, 7, dtype=torch.uint8).flatten(0, 1)
    expected[slots] = encode_latents(plain[slots], latent)
    assert torch.equal(store.flatten(0, 1).cpu(), expected)


@pytest.mark.gpu
def test_cuda_gives_a_token_the_same_bits_beside_any_number_of_others() -> None:
    *parts, rotation = problem(40, 1536, 512, 64, device="cuda")
    joint, q_weight, kv_weight = (part.bfloat16() for part in parts)
    slots = slots_of(40, "cuda")
    stores = torch.zeros(2, PAGES, PAGE, 576, device="cuda", dtype=torch.bfloat16)
    whole = mla_latents(joint, q_weight, kv_weight, rotation, stores[0], slots)
    parts = [
        mla_latents(
            joint[t : t + 1], q_weight, kv_weight, rotation[t : t + 1], stores[1], slots[t : t + 1]
        )
        for t in range(40)
    ]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(stores[0], stores[1])
