"""FP8 tiles and blocks: one program reads squares of 128 x 128 and writes every form of them.

Device memory moves 2 bytes an element in (BF16) and 1 out for each form, and nothing else should
limit: BF16 is handled in pairs, some six instructions an element and form, division included.

Rows that come through a table are read as often as it names them, and from the second time on from
the L2 cache, if they are still there: programs take columns in strips so narrow that a strip of all
tokens stays. Without a table programs that run together take strips side by side, so whole rows are
read.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from whalefall.kernels.tiles import (
    SHARED,
    SIDE,
    SQUARE,
    WARPS,
    divide,
    empty_tiles,
    group_slots,
    largest,
    padded_rows,
    rows_of_tile,
    scale_of,
    store,
    store_turned,
    store_zeros,
)

# Squares of a program: with a table or groups, several share what it takes to find their rows. Of
# the tokens that a table names, a strip of 256 columns is read again and again: 8.4 MB of 16,384
# tokens in BF16, of an L2 cache of 50 MB that also takes what is written.
_STRIP = 2


def tiles(x: Tensor, sources: Tensor | None, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [tokens, cols] in 1 x 128 tiles: values [rows, cols], scales [ceil(cols / 128), rows].

    Row i is that of token ``sources[i]``; without ``sources`` [rows] rows are tokens.
    """
    values, scales = empty_tiles(x, _rows(x, sources), x.shape[1])
    _quantize_tiles(x, None, sources, power_of_two, values, scales, None, None)
    return values, scales


def transposed(
    x: Tensor, ends: Tensor | None, sources: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """x^T in 1 x 128 tiles: values [cols, padded], scales [padded / 128, cols]."""
    values, scales = empty_tiles(x, x.shape[1], padded_rows(_rows(x, sources), ends))
    _quantize_tiles(x, ends, sources, power_of_two, None, None, values, scales)
    return values, scales


def both(
    x: Tensor, ends: Tensor | None, sources: Tensor | None, power_of_two: bool
) -> tuple[Tensor, ...]:
    """Values and scales of ``tiles``, then those of ``transposed``."""
    rows = _rows(x, sources)
    straight = empty_tiles(x, rows, x.shape[1])
    turned = empty_tiles(x, x.shape[1], padded_rows(rows, ends))
    _quantize_tiles(x, ends, sources, power_of_two, *straight, *turned)
    return *straight, *turned


def blocks(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] in 128 x 128 blocks, scales [..., out blocks, in blocks].

    The blocks of the scales' last dimension are padded with ones to a multiple of 4.
    """
    values, scales = _empty_blocks(weight)
    _quantize_blocks(weight, power_of_two, values, scales, None, None)
    return values, scales


def blocks_both(weight: Tensor, power_of_two: bool) -> tuple[Tensor, ...]:
    """Values and scales of the weight's blocks, then those of its transpose [..., in, out]."""
    straight, turned = _empty_blocks(weight), _empty_blocks(weight.mT)
    _quantize_blocks(weight, power_of_two, *straight, *turned)
    return *straight, *turned


def _quantize_tiles(
    x: Tensor,
    ends: Tensor | None,
    sources: Tensor | None,
    power_of_two: bool,
    *outputs: Tensor | None,
) -> None:
    rows, cols = _rows(x, sources), x.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    groups = 0 if ends is None else len(ends)
    # A tile more than there is room for in the transpose: rows that belong to nobody may need it.
    row_tiles = triton.cdiv(rows, 128) if ends is None else rows // 128 + groups + 1
    strip = 1 if ends is None and sources is None else _STRIP
    if row_tiles and cols:
        _quantize_tiles_kernel[(row_tiles * triton.cdiv(cols, 128 * strip),)](
            x,
            ends,
            None if sources is None else sources.contiguous(),
            *outputs,
            rows,
            cols,
            x.stride(0),
            padded_rows(rows, ends),
            groups,
            row_tiles,
            POWER_OF_TWO=power_of_two,
            GROUPS=group_slots(groups),
            STRIP=strip,
            num_warps=WARPS,
            # Four programs a multiprocessor read, compute and write at different times, which keeps
            # memory busy; a single square of BF16 takes no more than that by itself.
            maxnreg=64 if strip > 1 and x.dtype == torch.bfloat16 else None,
        )


def _quantize_blocks(weight: Tensor, power_of_two: bool, *outputs: Tensor | None) -> None:
    weight = weight.contiguous()
    rows, cols = weight.shape[-2:]
    # Blocks beyond the matrix write only the ones that pad the scales to a multiple of 4.
    grid = (4 * triton.cdiv(cols, 512), 4 * triton.cdiv(rows, 512), weight.shape[:-2].numel())
    if weight.numel():
        _quantize_blocks_kernel[grid](
            weight,
            *outputs,
            rows,
            cols,
            POWER_OF_TWO=power_of_two,
            num_warps=WARPS,
        )


def _empty_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    *experts, rows, cols = weight.shape
    return (
        weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn),
        weight.new_empty(
            *experts, triton.cdiv(rows, 128), 4 * triton.cdiv(cols, 512), dtype=torch.float32
        ),
    )


def _rows(x: Tensor, sources: Tensor | None) -> int:
    return len(x if sources is None else sources)


@gluon.jit
def _quantize_tiles_kernel(
    x_ptr,
    ends_ptr,
    sources_ptr,
    values_ptr,
    scales_ptr,
    turned_values_ptr,
    turned_scales_ptr,
    rows,
    cols,
    stride,
    padded,
    groups,
    row_tiles,
    POWER_OF_TWO: gl.constexpr,
    GROUPS: gl.constexpr,
    STRIP: gl.constexpr,
):
    """One program: STRIP squares side by side, of 128 rows of a group.

    A form whose pointers are None is not wanted; without ``ends_ptr`` rows are one group.
    """
    if sources_ptr is None:
        strips = gl.cdiv(cols, STRIP * SIDE)
        tile, strip = gl.program_id(0) // strips, gl.program_id(0) % strips
    else:
        tile, strip = gl.program_id(0) % row_tiles, gl.program_id(0) // row_tiles
    if ends_ptr is None:
        first, end, owned = tile * SIDE, rows, tile * SIDE < rows
    else:
        first, end, owned = rows_of_tile(ends_ptr, tile, rows, groups, GROUPS)
    # From here on everything is relative to the program's first row, in 32 bits.
    count, first = end - first, first.to(gl.int64)
    row = gl.arange(0, SIDE, gl.SliceLayout(1, SQUARE))
    if sources_ptr is None:
        x_ptr += first * stride
        source = row
    else:
        source = gl.load(sources_ptr + first + row, mask=row < count, other=0).to(gl.int64)
    for square in range(STRIP):
        start = (strip * STRIP + square) * SIDE
        if start < cols:
            col = start + gl.arange(0, SIDE, gl.SliceLayout(0, SQUARE))
            real = (row < count)[:, None] & (col < cols)[None, :]
            x = gl.load(x_ptr + (source * stride)[:, None] + col[None, :], mask=real, other=0.0)
            if turned_values_ptr is not None:
                shared = gl.allocate_shared_memory(x.dtype, [SIDE, SIDE], SHARED)
                shared.store(x)
            if values_ptr is not None:
                straight = (values_ptr + first * cols, scales_ptr + first)
                store(x, straight, row, start, count, rows, cols, POWER_OF_TWO)
            if turned_values_ptr is not None and tile * SIDE < padded:
                turned = (turned_values_ptr + tile * SIDE, turned_scales_ptr + tile * cols)
                if owned:
                    x = shared.permute([1, 0]).load(SQUARE)
                    store_turned(x, turned, start, cols, padded, POWER_OF_TWO)
                else:
                    store_zeros(turned, start, cols, padded)


@gluon.jit
def _quantize_blocks_kernel(
    weight_ptr,
    values_ptr,
    scales_ptr,
    turned_values_ptr,
    turned_scales_ptr,
    rows,
    cols,
    POWER_OF_TWO: gl.constexpr,
):
    across, down, expert = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    matrix = expert * rows * cols
    row = down * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, SQUARE))
    col = across * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, SQUARE))
    real = (row < rows)[:, None] & (col < cols)[None, :]
    at = matrix + row.to(gl.int64)[:, None] * cols + col[None, :]
    x = gl.load(weight_ptr + at, mask=real, other=0.0)
    if turned_values_ptr is not None:
        square = gl.allocate_shared_memory(x.dtype, [SIDE, SIDE], SHARED)
        square.store(x)
    scale = scale_of(gl.max(largest(x), 0), POWER_OF_TWO)
    scales = gl.full([SIDE], scale, gl.float32, gl.SliceLayout(1, SQUARE))
    gl.store(values_ptr + at, divide(x, scales, POWER_OF_TWO, True), mask=real)
    blocks_down, padded_across = gl.cdiv(rows, SIDE), gl.num_programs(0)
    at = (expert * blocks_down + down) * padded_across + across
    gl.store(scales_ptr + at, scale, mask=down < blocks_down)
    if turned_values_ptr is not None:
        row = across * SIDE + gl.arange(0, SIDE, gl.SliceLayout(1, SQUARE))
        col = down * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, SQUARE))
        real = (row < cols)[:, None] & (col < rows)[None, :]
        at = matrix + row.to(gl.int64)[:, None] * rows + col[None, :]
        turned = divide(square.permute([1, 0]).load(SQUARE), scales, POWER_OF_TWO, True)
        gl.store(turned_values_ptr + at, turned, mask=real)
        blocks_across, padded_down = gl.cdiv(cols, SIDE), gl.num_programs(1)
        at = (expert * blocks_across + across) * padded_down + down
        gl.store(turned_scales_ptr + at, scale, mask=across < blocks_across)
