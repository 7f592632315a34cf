"""FP8 tiles of activations and blocks of weights: memory-bound."""

from collections.abc import Iterator

import torch
from common_kernels import Row
from torch import Tensor

from whalefall.ops.quantize import (
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)


def rows() -> Iterator[Row]:
    tokens = torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16)
    yield Row(
        "quantize_tiles 16384 x 2048",
        lambda: quantize_tiles(tokens),
        bytes=_bytes(tokens, forms=1),
        peer=lambda: _eager_tiles(tokens),
        peer_name="torch",
    )
    yield Row(
        "quantize_transposed 16384 x 2048",
        lambda: quantize_transposed(tokens),
        bytes=_bytes(tokens, forms=1),
        peer=lambda: _eager_tiles(tokens.T.contiguous()),
        peer_name="torch",
    )
    yield Row(
        "quantize_both 16384 x 2048",
        lambda: quantize_both(tokens),
        bytes=_bytes(tokens, forms=2),
        peer=lambda: (_eager_tiles(tokens), _eager_tiles(tokens.T.contiguous())),
        peer_name="torch",
    )
    narrow = torch.randn(16384, 512, device="cuda", dtype=torch.bfloat16)
    yield Row(
        "quantize_both 16384 x 512",
        lambda: quantize_both(narrow),
        bytes=_bytes(narrow, forms=2),
    )
    pairs = torch.randn(98304, 2048, device="cuda", dtype=torch.bfloat16)
    cuts = torch.randperm(len(pairs), device="cuda")[:63].sort().values
    ends = torch.cat([cuts, cuts.new_tensor([len(pairs)])]).to(torch.int32)
    yield Row(
        "quantize_both 98304 x 2048, 64 groups",
        lambda: quantize_both(pairs, ends),
        bytes=_bytes(pairs, forms=2),
    )
    sources = _sources(ends)
    yield Row(
        "quantize_both 98304 of 16384 x 2048, 64 groups",
        lambda: quantize_both(tokens, ends, sources=sources),
        bytes=2 * tokens.numel() + _bytes(pairs, forms=2) - 2 * pairs.numel(),
        peer=lambda: quantize_both(tokens[sources], ends),
        peer_name="copied first",
    )
    experts = torch.randn(64, 2816, 2048, device="cuda", dtype=torch.bfloat16)
    yield Row(
        "quantize_blocks 64 x 2816 x 2048",
        lambda: quantize_blocks(experts),
        bytes=_bytes(experts, forms=1),
    )
    yield Row(
        "quantize_blocks_both 64 x 2816 x 2048",
        lambda: quantize_blocks_both(experts),
        bytes=_bytes(experts, forms=2),
    )


def _bytes(x: Tensor, forms: int) -> float:
    """BF16 in, FP8 out, and a scale for 128 values (of blocks: next to nothing)."""
    scales = 4 / 128 if x.dim() == 2 else 4 / 128**2
    return x.numel() * (2 + forms * (1 + scales))


def _sources(ends: Tensor) -> Tensor:
    """Six times each token, those of a group in their order."""
    sources = torch.randperm(6 * 16384, device="cuda") % 16384
    groups = torch.bucketize(torch.arange(len(sources), device="cuda"), ends, right=True)
    return (groups * 16384 + sources).sort().values.remainder(16384).to(torch.int32)


def _eager_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.float().unflatten(1, (-1, 128))
    scales = tiles.abs().amax(2) / 448
    return (tiles / scales[:, :, None]).to(torch.float8_e4m3fn).flatten(1), scales.T.contiguous()
