"""Number formats beside FP8 E4M3: E5M6 (paper 3.3.3), E5M2, and LogFMT (arXiv 2505.09343, 4.3).

All take tiles of 1 x 128. E5M6 is for the input of the linear layer after attention, whose tiles
the backward pass turns from rows to columns: scales that are powers of two make that exact for
all but numbers too small for the new tile. LogFMT was studied for sending tokens to experts and
back, and not deployed: the logarithms cost too much. E5M2 is what both are compared with.
"""

import math

import torch
from jaxtyping import Float, Float8e5m2, Float32, Integer
from torch import Tensor

from whalefall.ops.quantize import round_tiles, split_tiles

E5M6_MAX = 65024.0
"""2^15 (2 - 2^-6): as in IEEE formats, the highest of the 32 exponents is no number's."""

E5M2_MAX = 57344.0

_LOG_RANGE = 32 * math.log(2)


def round_e5m6(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x to the nearest number of 1 sign, 5 exponent (bias 15) and 6 mantissa bits, ties to even.

    Beyond 65024 it saturates; below 2^-14 the numbers are 2^-20 apart, down to zero. Every E5M6
    number is a BF16 and an FP16 number too, so the result has the type of ``x`` and is exact.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-E5M6_MAX, E5M6_MAX)
    # A mantissa of frexp is in [1/2, 1): its exponent is one more than the format's.
    exponent = torch.frexp(wide).exponent.clamp(min=-13) - 7
    spacing = torch.ldexp(torch.ones_like(wide), exponent)
    return ((wide / spacing).round() * spacing).to(x.dtype)


def quantize_e5m6(
    x: Float[Tensor, "rows cols"],
) -> tuple[Float[Tensor, "rows cols"], Float32[Tensor, "tiles rows"]]:
    """E5M6 values, held in BF16, and scales that are powers of two: x is about values * scales.

    The product is a BF16 number as well, unless it is below BF16's smallest normal, 2^-126.
    """
    return round_tiles(x, E5M6_MAX, lambda y: round_e5m6(y).bfloat16(), power_of_two=True)


def quantize_e5m2(
    x: Float[Tensor, "rows cols"],
) -> tuple[Float8e5m2[Tensor, "rows cols"], Float32[Tensor, "tiles rows"]]:
    """E5M2 values and scales amax / 57344."""
    return round_tiles(x, E5M2_MAX, lambda y: y.clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2))


def dequantize_values(
    values: Float[Tensor, "rows cols"], scales: Float32[Tensor, "tiles rows"]
) -> Float32[Tensor, "rows cols"]:
    """Values of any format times the scales of their tiles."""
    tiles = split_tiles(values.float()) * scales.T[:, :, None]
    return tiles.flatten(1)[:, : values.shape[1]]


def logfmt_encode(
    x: Float[Tensor, "rows cols"], bits: int
) -> tuple[
    Integer[Tensor, "rows cols"], Float32[Tensor, "rows tiles"], Float32[Tensor, "rows tiles"]
]:
    """Codes of sign and level, and for each tile the logarithm of level 1 and the step of a level.

    Level 0 is zero; levels 1 to 2^(bits - 1) - 1 go in equal steps of log|x| from the smallest
    number of the tile to the largest, but not below the largest / 2^32. A number between two
    levels takes the one that is nearer to it, not to its logarithm, which would be biased.
    Codes are ``uint8`` up to 8 bits, else ``int32``.

    Raises ValueError unless ``bits`` is from 3 to 16.
    """
    if not 3 <= bits <= 16:
        raise ValueError(f"LogFMT has 3 to 16 bits, not {bits}")
    top = 2 ** (bits - 1) - 1
    tiles = split_tiles(x.float())
    size = tiles.abs()
    log = size.log()
    high = log.amax(2, keepdim=True)
    low = torch.where(size > 0, log, math.inf).amin(2, keepdim=True).maximum(high - _LOG_RANGE)
    empty = high.isinf()  # the logarithm of a tile of zeros
    low, step = low.masked_fill(empty, 0.0), (high - low).masked_fill(empty, 0.0) / (top - 1)
    below = ((log - low) / step).nan_to_num(0.0).floor().clamp(0, top - 2)
    lower, upper = (low + step * below).exp(), (low + step * (below + 1)).exp()
    level = below + 1 + (size - lower > upper - size)
    level = level.masked_fill(size < low.exp() / 2, 0)
    codes = level.long() + (tiles < 0) * 2 ** (bits - 1)
    kept = codes.flatten(1)[:, : x.shape[1]].to(torch.uint8 if bits <= 8 else torch.int32)
    return kept, low.squeeze(2), step.squeeze(2)


def logfmt_decode(
    codes: Integer[Tensor, "rows cols"],
    low: Float32[Tensor, "rows tiles"],
    step: Float32[Tensor, "rows tiles"],
    bits: int,
) -> Float32[Tensor, "rows cols"]:
    """What ``logfmt_encode`` stands for: sign * exp(low + step * (level - 1))."""
    tiles = split_tiles(codes.float())
    negative = tiles >= 2 ** (bits - 1)
    level = torch.where(negative, tiles - 2 ** (bits - 1), tiles)
    size = (low[:, :, None] + step[:, :, None] * (level - 1)).exp()
    size = size.masked_fill(level == 0, 0.0)
    return torch.where(negative, -size, size).flatten(1)[:, : codes.shape[1]]
