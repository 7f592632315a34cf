"""Squares of 128 x 128 and tiles in FP8, on the device: what kernels that write tiles share.

128 is the length of a tile, the side of a block, and one cache line of FP8. A square stays in
registers along its rows, as it was read, and goes through shared memory to be read down its
columns for the transpose, so that threads hold most of a tile themselves and store 16 bytes either
way. It is turned while it is BF16: shared memory can transpose pairs of bytes on the way out
(``ldmatrix``), single bytes not.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from whalefall.kernels.arithmetic import halves, inverse_of, larger, pairs_of

WARPS = 8
SIDE = gl.constexpr(128)

# A thread holds 16 numbers of a tile, which it stores as 16 bytes of FP8, and again 16 half a tile
# on: 4 threads share a tile. Few, because what is done for each tile is done by each of them.
SQUARE = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [WARPS, 1], [1, 0]))

# Where a BF16 number of a square lies in shared memory: [row, column] of each bit of its address.
# 8 numbers are 16 bytes, of which 8 are read or written at once and must be in different banks:
# columns 16, 32 and rows 1 apart by threads that write rows, rows 1, 16, 32 apart by those that
# turn them.
_BITS = [[0, 1], [0, 2], [0, 4], [0, 16], [0, 32], [0, 64], [0, 8]]
_BITS += [[1, 64], [2, 0], [4, 0], [8, 0], [16, 16], [32, 32]]
SHARED_HALF = gl.constexpr(gl.SharedLinearLayout(_BITS))
SHARED = gl.constexpr(gl.SharedLinearLayout([*_BITS, [64, 0]]))


def padded_rows(rows: int, ends: Tensor | None) -> int:
    tiles = triton.cdiv(rows, 128) if ends is None else rows // 128 + len(ends)
    return tiles * 128


def group_slots(groups: int) -> int:
    """A power of 2 that ``rows_of_tile`` takes: every thread of a warp has a group or more."""
    return max(32, triton.next_power_of_2(groups))


def empty_tiles(like: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(rows, cols, dtype=torch.float8_e4m3fn),
        like.new_empty(triton.cdiv(cols, 128), rows, dtype=torch.float32),
    )


@gluon.jit
def rows_of_tile(ends_ptr, tile, rows, groups, GROUPS: gl.constexpr):
    """First row of a tile of the padded rows, the end of its group, whether it is a real group.

    Rows after the last group count as one group more. Every warp looks on its own, which needs no
    barrier.
    """
    each: gl.constexpr = GROUPS // 32
    group = gl.arange(0, GROUPS, gl.BlockedLayout([each], [32], [gl.num_warps()], [0]))
    begin = gl.load(ends_ptr + group - 1, mask=(group > 0) & (group < groups), other=0)
    end = gl.load(ends_ptr + group, mask=group < groups, other=0)
    tiles = gl.where(group < groups, (end - begin + (SIDE - 1)) >> 7, 0)
    after = gl.associative_scan(tiles, 0, _plus)
    before = after - tiles
    found = (before <= tile) & (tile < after)
    # Only one of the sums' terms is not zero.
    first = gl.sum(gl.where(found, begin - before * SIDE, 0), 0) + tile * SIDE
    last = gl.sum(gl.where(found, end, 0), 0)
    taken = gl.max(after, 0)
    if tile >= taken:
        last = rows
        first = gl.load(ends_ptr + groups - 1, mask=groups > 0, other=0) + (tile - taken) * SIDE
    return first, last, tile < taken


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def store(
    x,
    pointers,
    row,
    start,
    count,
    rows,
    cols,
    POWER_OF_TWO: gl.constexpr,
    EXACT: gl.constexpr = True,
):
    """A tile a row of x, of the 128 columns from ``start``, and its scale; from ``count`` on not.

    Rows are counted from where the pointers are, ``rows`` is how many there are in all.
    """
    values, scales = quantize(x, POWER_OF_TWO, EXACT)
    col = start + gl.arange(0, SIDE, gl.SliceLayout(0, x.type.layout))
    mask = (row < count)[:, None] & (col < cols)[None, :]
    gl.store(pointers[0] + (row[:, None] * cols + col[None, :]), values, mask=mask)
    gl.store(pointers[1] + (start // SIDE * rows + row), scales, mask=row < count)


@gluon.jit
def store_turned(
    x,
    pointers,
    start,
    cols,
    padded,
    POWER_OF_TWO: gl.constexpr,
    EXACT: gl.constexpr = True,
):
    """A square turned, a tile each of its columns, which is a piece of a row of what is stored."""
    layout: gl.constexpr = x.type.layout
    values, scales = quantize(x, POWER_OF_TWO, EXACT)
    values_at, scales_at, mask = _turned_at(pointers, start, cols, padded, layout)
    gl.store(values_at, values, mask=mask[:, None])
    gl.store(scales_at, scales, mask=mask)


@gluon.jit
def store_zeros(pointers, start, cols, padded, LAYOUT: gl.constexpr = SQUARE):
    values_at, scales_at, mask = _turned_at(pointers, start, cols, padded, LAYOUT)
    gl.store(values_at, gl.zeros([SIDE, SIDE], gl.float8e4nv, LAYOUT), mask=mask[:, None])
    gl.store(scales_at, 1.0, mask=mask)


@gluon.jit
def _turned_at(pointers, start, cols, padded, LAYOUT: gl.constexpr):
    row = gl.arange(0, SIDE, gl.SliceLayout(1, LAYOUT))
    col = gl.arange(0, SIDE, gl.SliceLayout(0, LAYOUT))
    values = pointers[0] + start.to(gl.int64) * padded
    at = row[:, None] * padded + col[None, :]
    return values + at, pointers[1] + start + row, start + row < cols


@gluon.jit
def quantize(x, POWER_OF_TWO: gl.constexpr, EXACT: gl.constexpr):
    """Rows, each a tile or a part of one, in FP8, and their scales."""
    scales = scale_of(largest(x), POWER_OF_TWO)
    return divide(x, scales, POWER_OF_TWO, EXACT), scales


@gluon.jit
def largest(x):
    """The largest magnitude of each row, in FP32."""
    if x.dtype == gl.bfloat16:
        low, high = halves(gl.reduce(pairs_of(x), 1, larger))
        # Numbers stayed with their threads: only the name of the layout changes.
        return gl.convert_layout(
            gl.maximum(gl.abs(low), gl.abs(high)),
            gl.SliceLayout(1, x.type.layout),
            assert_trivial=True,
        )
    return gl.max(gl.abs(x.to(gl.float32)), 1)


@gluon.jit
def scale_of(amax, POWER_OF_TWO: gl.constexpr):
    scale = _quotient(amax, 448.0)
    if POWER_OF_TWO:
        # Any bit of the mantissa carries into the exponent, then the mantissa is cut off.
        bits = scale.to(gl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & -0x800000).to(gl.float32, bitcast=True)
    return gl.where(scale > 0, gl.maximum(scale, 2.0**-126), 1.0)


@gluon.jit
def divide(x, scales, POWER_OF_TWO: gl.constexpr, EXACT: gl.constexpr):
    """Rows by their scales, in FP8: no other numbers than those of true division in FP32.

    Of BF16, the inverse of a scale in two parts is as exact as FP8 can tell: its rounding matters
    where a quotient is halfway between two numbers of FP8, nowhere else, and there the second part
    restores it. The inverse of a power of two is exact. Where that is not asked for, what is
    halfway may become either number, in an instruction less.
    """
    if x.dtype != gl.bfloat16:
        return _quotient(x.to(gl.float32), scales[:, None]).to(gl.float8e4nv)
    pairs = pairs_of(x)
    scales = gl.convert_layout(scales, gl.SliceLayout(1, pairs.type.layout), assert_trivial=True)
    inverse = inverse_of(scales)
    rest = gl.fma(-scales, inverse, 1.0) * inverse
    low, high = halves(pairs)
    if EXACT and not POWER_OF_TWO:
        inverse, rest = inverse[:, None], rest[:, None]
        low, high = gl.fma(low, inverse, low * rest), gl.fma(high, inverse, high * rest)
    else:
        inverse = (inverse + rest)[:, None]
        low, high = low * inverse, high * inverse
    values = gl.join(low, high).reshape(x.shape).to(gl.float8e4nv)
    return gl.convert_layout(values, x.type.layout, assert_trivial=True)


@gluon.jit
def _quotient(x, y):
    """x / y with the FP32 bits of true division, in three instructions an element of x.

    Many x share a y, so the inverse is made once. What its rounding costs the quotient is known
    from the remainder, which a fused multiply-add gives without error unless it is below the
    smallest FP32 number (y < 2^-90): then the last bit may differ.
    """
    inverse = 1.0 / y
    quotient = x * inverse
    return gl.fma(gl.fma(quotient, -y, x), inverse, quotient)
