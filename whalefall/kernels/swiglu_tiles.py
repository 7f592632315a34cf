"""SwiGLU between products in FP8: what it reads and writes is tiles.

Forward, one read of gate_up in BF16 gives the output and, for the backward pass, gate_up itself,
both in tiles. Backward, one read of the gradient in BF16 and of the kept tiles gives all that the
next products want: the gradient of gate_up contracted over features and over rows, and the output,
made again, over rows. At 98,304 x 1408 that is 0.98 GB (0.23 ms on an H200) and 1.28 GB (0.30 ms).

So few bytes leave little time for arithmetic, which is some 50 instructions for each number of the
output in the backward pass. It is in FP32 and rounded once to BF16; tiles are made of the rounded
numbers, with the bits of ``quantize`` but for the sign of a zero and, backward, for numbers halfway
between two of FP8: telling these apart would take five instructions more, and neither is nearer.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from whalefall.kernels.arithmetic import rounded
from whalefall.kernels.swiglu import activate, contiguous, differentiate, weight_of
from whalefall.kernels.tiles import (
    SIDE,
    empty_tiles,
    group_slots,
    padded_rows,
    rows_of_tile,
    store,
    store_turned,
    store_zeros,
)

_Pair = tuple[Tensor, Tensor]

_HALF = gl.constexpr(64)
_STRIP_WARPS, _SQUARE_WARPS = 4, 16

# A thread holds 16 numbers of a tile, which it stores as 16 bytes of FP8: 4 rows of 128 a warp, or
# 8 rows of 64 where the rows are columns of what shared memory holds.
_STRIP = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [_STRIP_WARPS, 1], [1, 0]))
_ALONG = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [_SQUARE_WARPS, 1], [1, 0]))
_DOWN = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [_SQUARE_WARPS, 1], [1, 0]))

# Copies to shared memory, 16 bytes a thread: of BF16 8 numbers, and of a column one.
_WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [_SQUARE_WARPS, 1], [1, 0]))
_ROWS = gl.constexpr(gl.BlockedLayout([1], [32], [_SQUARE_WARPS], [0]))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_PLAIN_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Programs that share 128 rows: enough that all multiprocessors finish together, few enough that
# finding the rows' group is little beside their squares.
_SPLIT = gl.constexpr(4)

# As in ``tiles``, but columns 16, 32, 64 apart are in different banks, for 8 threads a row.
_BITS = [[0, 1], [0, 2], [0, 4], [0, 16], [0, 32], [0, 64], [0, 8]]
_BITS += [[1, 16], [2, 0], [4, 0], [8, 0], [16, 32], [32, 64]]
_SHARED_HALF = gl.constexpr(gl.SharedLinearLayout(_BITS))
_SHARED = gl.constexpr(gl.SharedLinearLayout([*_BITS, [64, 0]]))


def forward(
    gate_up: Tensor, weights: Tensor | None, keep: bool, power_of_two: bool
) -> tuple[_Pair, _Pair | None]:
    """Values and scales of the output [rows, inner] and, to keep, of gate_up [rows, 2 inner].

    To keep, ``inner`` is a multiple of 128.
    """
    (rows, twice), block = gate_up.shape, 16
    inner = twice // 2
    out = empty_tiles(gate_up, rows, inner)
    kept = empty_tiles(gate_up, rows, twice) if keep else None
    if gate_up.numel():
        _swiglu_tiles_kernel[(triton.cdiv(rows, block) * triton.cdiv(inner, 128),)](
            gate_up.contiguous(),
            contiguous(weights),
            *out,
            *(kept or (None, None)),
            rows,
            inner,
            ROWS=block,
            POWER_OF_TWO=power_of_two,
            num_warps=_STRIP_WARPS,
        )
    return out, kept


def backward(
    grad: Tensor, kept: _Pair, weights: Tensor | None, ends: Tensor | None, power_of_two: bool
) -> tuple[_Pair, _Pair, _Pair, Tensor | None]:
    """Gradient of gate_up, the same transposed, the output transposed; gradient of weights.

    The first three are values and scales in 1 x 128 tiles, groups padded in the transposed ones as
    in ``quantize.transposed``. ``inner`` is a multiple of 128. Rows after the last group, which
    nobody owns, get nothing.
    """
    rows, inner = grad.shape
    padded, groups = padded_rows(rows, ends), 0 if ends is None else len(ends)
    straight = empty_tiles(grad, rows, 2 * inner)
    turned = empty_tiles(grad, 2 * inner, padded)
    out = empty_tiles(grad, inner, padded)
    # A row's squares are in different programs, whose sums are added in a fixed order.
    sums = None if weights is None else grad.new_empty(inner // 128, rows, dtype=torch.float32)
    if padded and inner:
        _swiglu_tiles_backward_kernel[(padded // 128 * _SPLIT.value,)](
            grad.contiguous(),
            *kept,
            contiguous(weights),
            ends,
            *straight,
            *turned,
            *out,
            sums,
            rows,
            inner,
            padded,
            groups,
            POWER_OF_TWO=power_of_two,
            GROUPS=group_slots(groups),
            num_warps=_SQUARE_WARPS,
            maxnreg=64,  # two programs a multiprocessor, which their shared memory allows as well
        )
    if weights is None or sums is None:
        return straight, turned, out, None
    return straight, turned, out, sums.sum(0).to(weights.dtype)


@gluon.jit
def _swiglu_tiles_kernel(
    gate_up_ptr,
    weights_ptr,
    values_ptr,
    scales_ptr,
    kept_values_ptr,
    kept_scales_ptr,
    rows,
    inner,
    ROWS: gl.constexpr,
    POWER_OF_TWO: gl.constexpr,
):
    """One program: ROWS x 128 of the output, and of gate and up where they are kept."""
    start = gl.program_id(0) % gl.cdiv(inner, SIDE) * SIDE
    first = (gl.program_id(0) // gl.cdiv(inner, SIDE)).to(gl.int64) * ROWS
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, _STRIP))
    col = start + gl.arange(0, SIDE, gl.SliceLayout(0, _STRIP))
    gate, up, out = activate(gate_up_ptr, weights_ptr, row, col, rows, inner)
    pointers = (values_ptr, scales_ptr)
    store(rounded(out), pointers, row, start, rows, rows, inner, POWER_OF_TWO)
    if kept_values_ptr is not None:
        pointers = (kept_values_ptr, kept_scales_ptr)
        store(gate, pointers, row, start, rows, rows, 2 * inner, POWER_OF_TWO)
        store(up, pointers, row, inner + start, rows, rows, 2 * inner, POWER_OF_TWO)


@gluon.jit
def _swiglu_tiles_backward_kernel(
    grad_ptr,
    kept_ptr,
    kept_scales_ptr,
    weights_ptr,
    ends_ptr,
    values_ptr,
    scales_ptr,
    turned_values_ptr,
    turned_scales_ptr,
    out_values_ptr,
    out_scales_ptr,
    sums_ptr,
    rows,
    inner,
    padded,
    groups,
    POWER_OF_TWO: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """One program: 128 rows of one group, and of their squares of 128 columns every _SPLIT-th.

    64 rows at a time are computed and stored along the rows, and wait in shared memory to be turned
    when all 128 are there. As soon as a square is turned its memory takes what the next square is
    computed from, which so arrives while others are turned: grad where the output was, gate and up,
    in FP8, where the gradient of gate was. So a thread needs 64 registers, and a multiprocessor
    runs two programs. Where no group reaches, zeros are written.
    """
    tile = gl.program_id(0) // _SPLIT
    if ends_ptr is None:
        first, end, owned = tile * SIDE, rows, tile * SIDE < rows
    else:
        first, end, owned = rows_of_tile(ends_ptr, tile, rows, groups, GROUPS)
    count, first = end - first, first.to(gl.int64)
    # From here on everything is relative to the program's first row, in 32 bits.
    grad_ptr += first * inner
    kept = (kept_ptr + first * (2 * inner), kept_scales_ptr + first)
    straight = (values_ptr + first * (2 * inner), scales_ptr + first)
    turned = (turned_values_ptr + tile * SIDE, turned_scales_ptr + tile * (2 * inner))
    outs = (out_values_ptr + tile * SIDE, out_scales_ptr + tile * inner)
    if weights_ptr is not None:
        weights_ptr += first
        sums_ptr += first
    out_halves = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, SIDE], _SHARED_HALF)
    gate_halves = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, SIDE], _SHARED_HALF)
    up_halves = gl.allocate_shared_memory(gl.bfloat16, [2, _HALF, SIDE], _SHARED_HALF)
    kept_scales = gl.allocate_shared_memory(gl.float32, [2 * SIDE], _PLAIN_ROW)
    kept_values = gate_halves._reinterpret(gl.float8e4nv, [2 * SIDE, SIDE], _PLAIN)
    begin = gl.program_id(0) % _SPLIT * SIDE
    if owned & (begin < inner):
        _fetch_grad(grad_ptr, out_halves, begin, count, inner)
        _fetch_kept(kept, kept_values, kept_scales, begin, count, rows, inner)
        for start in range(begin, inner, _SPLIT * SIDE):
            async_copy.wait_group(0)
            for half in range(2):
                row = half * _HALF + gl.arange(0, _HALF, gl.SliceLayout(1, _ALONG))
                real = row < count
                grad = out_halves.index(half).load(_ALONG)
                gate = _load(kept_values, kept_scales, 2 * half)
                up = _load(kept_values, kept_scales, 2 * half + 1)
                weight = weight_of(row, weights_ptr, real)
                out, gate, up, along = differentiate(gate, up, grad, weight)
                out, gate, up = rounded(out), rounded(gate), rounded(up)
                out_halves.index(half).store(out)
                gate_halves.index(half).store(gate)
                up_halves.index(half).store(up)
                store(gate, straight, row, start, count, rows, 2 * inner, POWER_OF_TWO, False)
                store(up, straight, row, inner + start, count, rows, 2 * inner, POWER_OF_TWO, False)
                if weights_ptr is not None:
                    gl.store(sums_ptr + (start // SIDE * rows + row), along, mask=real)
            after = start + _SPLIT * SIDE
            _store_turned(out_halves, outs, start, inner, padded, POWER_OF_TWO)
            if after < inner:
                _fetch_grad(grad_ptr, out_halves, after, count, inner)
            _store_turned(gate_halves, turned, start, 2 * inner, padded, POWER_OF_TWO)
            if after < inner:
                _fetch_kept(kept, kept_values, kept_scales, after, count, rows, inner)
            _store_turned(up_halves, turned, inner + start, 2 * inner, padded, POWER_OF_TWO)
    else:
        for start in range(begin, inner, _SPLIT * SIDE):
            store_zeros(outs, start, inner, padded, _DOWN)
            store_zeros(turned, start, 2 * inner, padded, _DOWN)
            store_zeros(turned, inner + start, 2 * inner, padded, _DOWN)


@gluon.jit
def _fetch_grad(grad_ptr, halves, start, count, inner):
    """Begins to copy a square of grad, with zeros from row ``count`` on."""
    row = gl.arange(0, SIDE, gl.SliceLayout(1, _WIDE))
    col = start + gl.arange(0, SIDE, gl.SliceLayout(0, _WIDE))
    at = row[:, None] * inner + col[None, :]
    mask = (row < count)[:, None]
    async_copy.async_copy_global_to_shared(_square(halves), grad_ptr + at, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _fetch_kept(kept, values, scales, start, count, rows, inner):
    """Begins to copy what ``_load`` takes: half of gate, half of up, and then the other halves."""
    row, col = _kept_at(gl.arange(0, 2 * SIDE, gl.SliceLayout(1, _ALONG)), start, inner)
    at = (row * (2 * inner) + col)[:, None] + gl.arange(0, SIDE, gl.SliceLayout(0, _ALONG))[None, :]
    mask = (row < count)[:, None]
    async_copy.async_copy_global_to_shared(values, kept[0] + at, mask=mask)
    row, col = _kept_at(gl.arange(0, 2 * SIDE, _ROWS), start, inner)
    at = col // SIDE * rows + row
    async_copy.async_copy_global_to_shared(scales, kept[1] + at, mask=row < count)
    async_copy.commit_group()


@gluon.jit
def _kept_at(line, start, inner):
    half, up, row = line // SIDE, line // _HALF % 2, line % _HALF
    return half * _HALF + row, up * inner + start


@gluon.jit
def _load(values, scales, part):
    """Half a square in FP32, of gate or up."""
    values = values._reinterpret(gl.float8e4nv, [4, _HALF, SIDE], _PLAIN).index(part)
    scales = scales._reinterpret(gl.float32, [4, _HALF], _PLAIN_ROW).index(part)
    scales = scales.load(gl.SliceLayout(1, _ALONG))
    return values.load(_ALONG).to(gl.float32) * scales[:, None]


@gluon.jit
def _store_turned(halves, pointers, start, cols, padded, POWER_OF_TWO: gl.constexpr):
    square = _square(halves).permute([1, 0]).load(_DOWN)
    store_turned(square, pointers, start, cols, padded, POWER_OF_TWO, False)


@gluon.jit
def _square(halves):
    return halves._reinterpret(gl.bfloat16, [SIDE, SIDE], _SHARED)
