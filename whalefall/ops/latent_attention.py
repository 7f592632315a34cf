"""Decoding over the paged latent cache: MLA in its absorbed form (paper 2.1.1).

All heads of a token attend over the same latents: 512 numbers that are keys and values at once,
then the rotated key of 64. They lie in pages of 64 tokens, anywhere in one store, and a table says
which pages a row has. A row may ask with several tokens, as when drafts are verified.

In the FP8 form a cached token is 656 bytes: the 512 numbers in E4M3, the FP32 scales of each 128 of
them, and the rotated key in BF16, which suffers most from fewer bits.
"""

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel
from whalefall.ops.quantize import TILE, Tiles, dequantize, quantize_tiles

PAGE = 64
"""Tokens of a page."""


def latent_attention(
    q: Float[Tensor, "rows width heads latent"],
    store: Shaped[Tensor, "n_pages page size"],
    pages: Int32[Tensor, "rows max_pages"],
    lengths: Int32[Tensor, "rows"],
    *,
    value_dim: int,
    scale: float,
    split_keys: int | None = None,
    plan: Tensor | None = None,
) -> Float[Tensor, "rows width heads {value_dim}"]:
    """Mix of the first ``value_dim`` numbers of the latents that each query sees.

    Query j of a row sees its keys 0 to ``lengths[row] + j``: the latents of the new tokens are in
    the store already. The store has pages of 64 tokens in the type of q, or encoded as uint8; all
    of it must be finite, and entries of ``pages`` that a row does not need must name some page.
    ``plan`` is what ``plan_attention`` made for a step, whose layers can share it.

    On CUDA in BF16 nothing depends on the lengths but the work itself: what is launched, and the
    memory it takes, follow from the shapes. With ``split_keys``, a multiple of 64, a row is reduced
    in pieces of so many keys, and its result has the same bits in any batch.
    """
    _check_split(split_keys)
    _, width, heads, _ = q.shape
    if runs_cpu_kernel(q):
        from whalefall.kernels.cpu import mla

        if not runs_cpu_kernel(store):
            store, pages = _decoded(store, pages, lengths, width, value_dim, q.dtype)
        where = pages.int().contiguous(), lengths.int().contiguous()
        return mla.latent_attention(q, store, *where, value_dim, scale)
    if not _runs_kernel(q.device, q.dtype):
        return _gathered(q, store, pages, lengths, value_dim, scale)
    if plan is None:
        plan = plan_attention(
            lengths,
            width=width,
            heads=heads,
            max_pages=pages.shape[1],
            dtype=q.dtype,
            split_keys=split_keys,
        )
    assert plan is not None
    if not store.is_contiguous():
        raise ValueError("expected a store whose pages follow one another in memory")
    from whalefall.kernels import latent_attention as kernel

    split = (split_keys or 0) // PAGE
    return kernel.forward(
        q.contiguous(), store, (pages.contiguous(), lengths, plan), value_dim, scale, split
    )


def plan_attention(
    lengths: Int32[Tensor, "rows"],
    *,
    width: int,
    heads: int,
    max_pages: int,
    dtype: torch.dtype,
    split_keys: int | None = None,
) -> Tensor | None:
    """How attention to rows of these lengths is spread over a GPU: the same in all layers.

    None where no kernel asks for it. ``dtype`` is that of the queries. Raises ValueError if
    ``split_keys`` is no multiple of 64.
    """
    _check_split(split_keys)
    if not _runs_kernel(lengths.device, dtype):
        return None
    from whalefall.kernels import latent_attention as kernel

    return kernel.plan(lengths, width, heads, max_pages, (split_keys or 0) // PAGE)


def reference(
    q: Float[Tensor, "rows width heads latent"],
    store: Shaped[Tensor, "n_pages page size"],
    pages: Int32[Tensor, "rows max_pages"],
    lengths: Int32[Tensor, "rows"],
    *,
    value_dim: int,
    scale: float,
) -> Float[Tensor, "rows width heads {value_dim}"]:
    """The definition, query by query, in the type of q."""
    if store.dtype == torch.uint8:
        store = decode_latents(store.flatten(0, 1), value_dim, q.dtype).view(*store.shape[:2], -1)
    out = q.new_empty(*q.shape[:3], value_dim)
    for row, length in enumerate(lengths.tolist()):
        latents = store[pages[row].long()].flatten(0, 1).to(q.dtype)
        for j in range(q.shape[1]):
            seen = latents[: length + j + 1]
            weights = (q[row, j] @ seen.T * scale).softmax(-1)
            out[row, j] = weights @ seen[:, :value_dim]
    return out


def encode_latents(
    latent: Float[Tensor, "tokens latent"], value_dim: int = 512
) -> UInt8[Tensor, "tokens size"]:
    """As the FP8 form of the cache holds them: 656 bytes of 576 numbers."""
    tiles = quantize_tiles(latent[:, :value_dim].contiguous())
    rotated = latent[:, value_dim:].to(torch.bfloat16)
    parts = [tiles.values, tiles.scales.T, rotated]
    # A copy, because no rows are contiguous with any strides, and those cannot be viewed as bytes.
    parts = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


def encoded_size(latent: int, value_dim: int = 512) -> int:
    """Bytes of an encoded token of ``latent`` numbers."""
    return value_dim + 4 * -(-value_dim // TILE) + 2 * (latent - value_dim)


def decode_latents(
    encoded: UInt8[Tensor, "tokens size"],
    value_dim: int = 512,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens latent"]:
    """What the encoded latents say, with one rounding to ``dtype``."""
    scaled = encoded_size(value_dim, value_dim)
    values = encoded[:, :value_dim].view(torch.float8_e4m3fn)
    scales = encoded[:, value_dim:scaled].contiguous().view(torch.float32)
    rotated = encoded[:, scaled:].contiguous().view(torch.bfloat16)
    return torch.cat([dequantize(Tiles(values, scales.T), dtype), rotated.to(dtype)], -1)


def _runs_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16


def _gathered(
    q: Tensor, store: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    """Two products over the latents of all rows side by side, as many as the longest row has."""
    rows, width, heads, _ = q.shape
    last = lengths.unsqueeze(1) + torch.arange(width, device=lengths.device)
    own, ids = _decoded(store, pages, lengths, width, value_dim, q.dtype)
    keys = ids.shape[1] * PAGE  # whole pages; what no query sees is hidden below
    latents = own.view(rows, keys, own.shape[-1])
    hidden = torch.arange(keys, device=lengths.device) > last.unsqueeze(-1)
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill_(hidden, -torch.inf).repeat_interleave(heads, 1)
    scores = torch.baddbmm(bias, q.flatten(1, 2), latents.mT, alpha=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(q.dtype)
    return torch.bmm(weights, latents[..., :value_dim]).view(rows, width, heads, value_dim)


def _decoded(
    store: Tensor, pages: Tensor, lengths: Tensor, width: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The pages that any row needs, one row's after another's, as numbers; and where they are."""
    rows, longest = len(pages), int(lengths.max()) + width if len(lengths) else 0
    needed = -(-longest // PAGE)
    own = store[pages[:, :needed].flatten().long()]
    if store.dtype == torch.uint8:
        own = decode_latents(own.flatten(0, 1), value_dim, dtype).unflatten(0, (-1, PAGE))
    ids = torch.arange(len(own), dtype=torch.int32, device=store.device)
    return own.to(dtype), ids.view(rows, needed)


def _check_split(split_keys: int | None) -> None:
    if split_keys is not None and (split_keys < PAGE or split_keys % PAGE):
        raise ValueError(f"expected split_keys to be a multiple of {PAGE}, not {split_keys}")
