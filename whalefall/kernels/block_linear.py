"""A projection of few rows: its weights are read in a microsecond, so that waiting is the time.

A weight of 4 MB has no more than a few steps for each multiprocessor, and no time for them to be
one after another. So a program takes only 16 or 32 rows of the weight, which makes programs for
all, and each of its eight warps a slice of their length: 512 numbers are one step, and up to four
are on their way before the first is multiplied. The eight sums are added at the end. Tensor cores
take tiles this small by ``mma.sync``, the weight on the left.

FP8 weights become BF16 in registers (see ``few_rows``); their scales are those of a warp's slice.

A result is the same sum in the same order, whatever tile it is in and whatever rows share it.
"""

import triton
import triton.language as tl
from torch import Tensor

from whalefall.kernels.device import multiprocessors
from whalefall.kernels.few_rows import BLOCK, numbers, to_bf16

_SLICES = 8
_SLICE = 64  # numbers of a step
_SHARED_BYTES = 216 * 1024  # of the 227 KiB of a multiprocessor


def forward(x: Tensor, weight: Tensor, scale: Tensor | None, block_rows: int) -> Tensor:
    """x W^T: [rows, cols] of x [rows, inner], weight [cols, inner], scale [blocks, blocks]."""
    (rows, inner), cols = x.shape, len(weight)
    out = x.new_empty(rows, cols)
    if rows:
        row_tiles = triton.cdiv(rows, block_rows)
        processors = multiprocessors(x.device)
        height = 32 if row_tiles * triton.cdiv(cols, 32) > 0.9 * processors else 16
        _block_linear_kernel[triton.cdiv(cols, height), row_tiles](
            x.contiguous(), numbers(weight), scale, out, rows, cols, inner,
            block_rows, height, _SLICES, _SLICE,
            num_warps=_SLICES, num_stages=1 + _steps_ahead(weight.itemsize, height, block_rows),
        )  # fmt: skip
    return out


def _steps_ahead(itemsize: int, height: int, block_rows: int) -> int:
    programs = 2 if block_rows == 16 else 1  # of a multiprocessor, by their registers
    step = _SLICES * _SLICE * (height * itemsize + block_rows * 2)
    return min(4, _SHARED_BYTES // programs // step)


@triton.jit(do_not_specialize=["rows"])
def _block_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, rows, cols, inner,
    ROWS: tl.constexpr, HEIGHT: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    PACK: tl.constexpr = 1 if scale_ptr is None else 2
    STEP: tl.constexpr = SLICES * SLICE
    col = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < rows)[None, :, None]
    line = tl.minimum(col, cols - 1).to(tl.int64)
    weight_at = weight_ptr + line[None, :, None] * (inner // PACK)
    x_at = x_ptr + row.to(tl.int64)[None, :, None] * inner
    begin = tl.arange(0, SLICES) * SLICE
    within = begin[:, None, None] + tl.arange(0, SLICE)[None, None, :]
    pair_within = (begin // PACK)[:, None, None] + tl.arange(0, SLICE // PACK)[None, None, :]
    sums = tl.zeros((SLICES, HEIGHT, ROWS), tl.float32)
    if scale_ptr is not None:
        scale_ptr += tl.program_id(0) * HEIGHT // BLOCK * tl.cdiv(inner, BLOCK)
        scale = tl.load(scale_ptr + begin // BLOCK, begin < inner, other=0.0)
    for at in range(0, inner, STEP):
        k, pair = at + within, at // PACK + pair_within
        weight = tl.load(weight_at + pair, pair < inner // PACK, other=0)
        x = tl.load(x_at + k, (k < inner) & is_row, other=0.0).permute(0, 2, 1)
        if scale_ptr is None:
            sums = tl.dot(weight, x, sums)
        else:  # the next scales are on their way during this product
            ahead = at + STEP + begin
            following = tl.load(scale_ptr + ahead // BLOCK, ahead < inner, other=0.0)
            sums += tl.dot(to_bf16(weight), x) * scale[:, None, None]
            scale = following
    out = tl.sum(sums, 0).T.to(out_ptr.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(out_ptr + at, out, (row < rows)[:, None] & (col < cols)[None, :])
