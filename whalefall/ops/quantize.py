"""FP8 E4M3 with one FP32 scale a tile or block, made from the data itself (paper 3.3.2).

Activations and gradients are scaled in tiles of 1 x 128 along the dimension a GEMM contracts,
weights in blocks of 128 x 128: one outlier spoils its own tile and nothing else. A scale is
amax / 448, so the largest value becomes 448, the largest of E4M3; it is what the values are
multiplied by to get the numbers back. All-zero tiles have scale 1. A NaN stays a NaN, and the
tile of an infinity dequantizes to NaN.

The plain forms here say exactly what the kernels compute, bit for bit: division in FP32, clamp to
+-448, round to nearest even. ``power_of_two`` rounds the scale up to a power of two, which makes
scaling and unscaling exact.

A GEMM contracts the last dimension of both sides. Forward and input gradient contract features;
the weight gradient contracts rows, so it needs x^T, in tiles along the rows.

Rows may come through a table: with ``sources`` row i of what is quantized is ``x[sources[i]]``.
A token that goes to several experts is read from where it is, never copied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

from whalefall.ops.function import runs_kernel

TILE = 128
"""Elements that share a scale along each scaled dimension."""

E4M3_MAX = 448.0

SMALLEST_SCALE = 2.0**-126
"""FP32's smallest normal number, whose inverse is finite."""


@dataclass(frozen=True)
class Tiles:
    """A matrix in 1 x 128 tiles along its last dimension, the one a GEMM contracts."""

    values: Float8e4m3fn[Tensor, "rows cols"]
    scales: Float32[Tensor, "tiles rows"]
    """[ceil(cols / 128), rows]: a GEMM reads the scales of neighbouring rows together."""


@dataclass(frozen=True)
class Blocks:
    """Weights in 128 x 128 blocks."""

    values: Float8e4m3fn[Tensor, "*experts out in"]
    scales: Float32[Tensor, "*experts out_blocks in_blocks"]
    """[..., ceil(out / 128), ceil(in / 128)], the last padded with ones to a multiple of 4, which
    cuBLAS wants."""


def quantize_tiles(
    x: Float[Tensor, "tokens cols"],
    *,
    sources: Int[Tensor, "rows"] | None = None,
    power_of_two: bool = False,
) -> Tiles:
    """x in tiles along its columns; of int32 ``sources``, the rows they name, in their order."""
    if runs_kernel(x):
        from whalefall.kernels import quantize as kernel

        return Tiles(*kernel.tiles(x, sources, power_of_two))
    return Tiles(*round_tiles(_rows(x, sources), E4M3_MAX, _to_e4m3, power_of_two=power_of_two))


def quantize_transposed(
    x: Float[Tensor, "tokens cols"],
    ends: Int[Tensor, "groups"] | None = None,
    *,
    sources: Int[Tensor, "rows"] | None = None,
    power_of_two: bool = False,
) -> Tiles:
    """x^T in tiles along the rows of x: values [cols, padded], scales [padded / 128, cols].

    With ``ends`` the rows are sorted by group and ``ends[g]`` is the row after the last of group
    g. No tile may mix groups, so each group is padded with zeros to a multiple of 128: group g
    starts at column 128 * sum over h < g of ceil(size_h / 128). How far the groups reach is known
    on the device only; ``padded`` is the most it can be, (rows // 128 + groups) * 128. Zeros with
    scale 1 fill what is left, and rows from ``ends[-1]`` on, which belong to nobody, are left out.
    Without ``ends`` all rows are one group and ``padded`` is the next multiple of 128.
    ``sources`` as in ``quantize_tiles``: the rows that ``ends`` counts are theirs.
    """
    if runs_kernel(x):
        from whalefall.kernels import quantize as kernel

        return Tiles(*kernel.transposed(x, ends, sources, power_of_two))
    return quantize_tiles(_pad_groups(_rows(x, sources), ends).T, power_of_two=power_of_two)


def quantize_both(
    x: Float[Tensor, "tokens cols"],
    ends: Int[Tensor, "groups"] | None = None,
    *,
    sources: Int[Tensor, "rows"] | None = None,
    power_of_two: bool = False,
) -> tuple[Tiles, Tiles]:
    """``quantize_tiles`` (of all rows) and ``quantize_transposed`` in one read of x."""
    if runs_kernel(x):
        from whalefall.kernels import quantize as kernel

        values, scales, values_t, scales_t = kernel.both(x, ends, sources, power_of_two)
        return Tiles(values, scales), Tiles(values_t, scales_t)
    x = _rows(x, sources)
    return (
        quantize_tiles(x, power_of_two=power_of_two),
        quantize_transposed(x, ends, power_of_two=power_of_two),
    )


def quantize_blocks(
    weight: Float[Tensor, "*experts out in"], *, power_of_two: bool = False
) -> Blocks:
    """Weights in blocks; those at the lower and right edge may be partial."""
    if runs_kernel(weight):
        from whalefall.kernels import quantize as kernel

        return Blocks(*kernel.blocks(weight, power_of_two))
    rows, cols = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -cols % TILE, 0, -rows % TILE))
    blocks = padded.unflatten(-1, (_count(cols), TILE)).unflatten(-3, (_count(rows), TILE))
    scales = scale_of(blocks.abs().amax((-3, -1)), power_of_two=power_of_two)
    values = _to_e4m3(blocks / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return Blocks(
        values[..., :rows, :cols].contiguous(), F.pad(scales, (0, -_count(cols) % 4), value=1.0)
    )


def quantize_blocks_both(
    weight: Float[Tensor, "*experts out in"], *, power_of_two: bool = False
) -> tuple[Blocks, Blocks]:
    """The blocks of the weight and of its transpose [..., in, out], in one read of it.

    A block of the transpose is a block's transpose and has its scale.
    """
    if runs_kernel(weight):
        from whalefall.kernels import quantize as kernel

        values, scales, values_t, scales_t = kernel.blocks_both(weight, power_of_two)
        return Blocks(values, scales), Blocks(values_t, scales_t)
    return (
        quantize_blocks(weight, power_of_two=power_of_two),
        quantize_blocks(weight.mT, power_of_two=power_of_two),
    )


def dequantize(
    quantized: Tiles | Blocks, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*experts rows cols"]:
    """Values times scales in FP32, or exactly in float64, then one rounding to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    values, scales = quantized.values.to(wide), quantized.scales.to(wide)
    rows, cols = values.shape[-2:]
    if isinstance(quantized, Tiles):
        scales = scales.T
    else:
        scales = scales.repeat_interleave(TILE, -2)[..., :rows, :]
    return (values * scales.repeat_interleave(TILE, -1)[..., :cols]).to(dtype)


def round_tiles(
    x: Float[Tensor, "rows cols"],
    largest: float,
    to_format: Callable[[Tensor], Tensor],
    *,
    power_of_two: bool = False,
) -> tuple[Float[Tensor, "rows cols"], Float32[Tensor, "tiles rows"]]:
    """Values and scales of x in tiles of any format whose largest number is ``largest``."""
    tiles = split_tiles(x.float())
    scales = scale_of(tiles.abs().amax(2), largest, power_of_two=power_of_two)
    values = to_format(tiles / scales[:, :, None]).flatten(1)[:, : x.shape[1]]
    return values.contiguous(), scales.T.contiguous()


def split_tiles(x: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows tiles 128"]:
    """The tiles of each row, the last one filled with zeros."""
    return F.pad(x, (0, -x.shape[1] % TILE)).unflatten(1, (_count(x.shape[1]), TILE))


def scale_of(
    amax: Float32[Tensor, "*tiles"], largest: float = E4M3_MAX, *, power_of_two: bool = False
) -> Float32[Tensor, "*tiles"]:
    """What brings ``amax`` to the largest number of a format when divided by; 1 for zero."""
    scale = amax / largest
    if power_of_two:
        # Any bit of the mantissa carries into the exponent, then the mantissa is cut off.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)
    return torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), 1.0)


def _count(size: int) -> int:
    """Tiles that cover ``size`` elements."""
    return -(-size // TILE)


def _to_e4m3(scaled: Tensor) -> Tensor:
    # amax / 448 may have been rounded down: an ulp above 448 must not overflow.
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _rows(x: Tensor, sources: Tensor | None) -> Tensor:
    return x if sources is None else x.index_select(0, sources)


def _pad_groups(x: Tensor, ends: Tensor | None) -> Tensor:
    """The rows of each group at a multiple of 128, zeros between them."""
    if ends is None:
        return F.pad(x, (0, 0, 0, -len(x) % TILE))
    ends = ends.long()
    sizes = ends.diff(prepend=ends.new_zeros(1))
    tiles = (sizes + TILE - 1) // TILE
    shifts = TILE * (tiles.cumsum(0) - tiles) - (ends - sizes)
    rows = torch.arange(int(ends[-1]), device=x.device)
    padded = x.new_zeros((len(x) // TILE + len(ends)) * TILE, x.shape[1])
    padded[rows + shifts.repeat_interleave(sizes)] = x[: len(rows)]
    return padded
