"""The weight gradients of the experts in FP8: which tiles there are for ``gemm_tiles``.

They are ordered by group, so that what a group needs stays in L2 while it is multiplied. Arithmetic
is the bound, and more of it than in the forward pass: adding a partial sum takes two
multiplications a number, as both operands have scales of their own in every row.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whalefall.kernels import gemm_tiles
from whalefall.kernels.device import multiprocessors
from whalefall.kernels.gemm_tiles import BLOCK, HALF, OPERANDS, SCALES


def grouped_wgrad(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], ends: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a b^T over the tokens of each group: [groups, rows, cols].

    Of a [rows, padded] and b [cols, padded], values and scales in 1x128 tiles; ``rows`` and
    ``cols`` are multiples of 16. The tokens of group g begin at 128 * sum over h < g of
    ceil(size_h / 128). Empty groups give zeros.

    And what their squares add up to before they are rounded: FP32 [parts]. What a block has outside
    of the result are zeros, which take finite scales: those of padding, too.
    """
    (a_values, a_scales), (b_values, b_scales) = a, b
    groups, rows, cols = len(ends), len(a_values), len(b_values)
    out = a_values.new_empty(groups, rows, cols, dtype=dtype)
    tiles = groups * -(-rows // 128) * -(-cols // 256)  # at most
    squares = a_scales.new_zeros(2 * tiles * HALF.value)
    # Scales are copied from flat tensors: the rows of others must be whole 16 bytes.
    _grouped_wgrad_kernel[(min(tiles, multiprocessors(out.device)),)](
        TensorDescriptor.from_tensor(a_values, [128, 128], OPERANDS),
        TensorDescriptor.from_tensor(a_scales.flatten(), [128], SCALES),
        TensorDescriptor.from_tensor(b_values, [128, 128], OPERANDS),
        TensorDescriptor.from_tensor(b_scales.flatten(), [128], SCALES),
        ends, out, squares, groups, rows, cols,
        num_warps=4,
    )  # fmt: skip
    return out, squares


@gluon.jit(do_not_specialize=["groups", "rows"])
def _grouped_wgrad_kernel(a, a_scales, b, b_scales, ends, out, squares, groups, rows, cols):
    sources = (a, a_scales, b, b_scales)
    strides = (rows, cols, BLOCK)
    gemm_tiles.play(_walk, (ends, groups, rows, cols), sources, strides, out, cols, squares)


@gluon.jit
def _walk(role: gl.constexpr, means, problem):
    """Plays a role in this program's tiles."""
    ends, groups, rows, cols = problem
    down, across = gl.cdiv(rows, BLOCK), gl.cdiv(cols, BLOCK)
    tiles = gemm_tiles.count(down, across)  # of each group
    tile = gl.program_id(0)
    first_tile = 0  # of the group
    start = 0  # its first row
    first_step = 0  # its first 128 tokens, padded
    steps_before = 0
    tiles_before = 0
    for group in range(groups):
        end = gl.load(ends + group)
        steps = gl.cdiv(end - start, BLOCK)
        while tile < first_tile + tiles:
            row, col, tall = gemm_tiles.find(tile - first_tile, down, across)
            top = group * rows
            target = (top + row, col, top, top + rows)
            span = (first_step, steps, steps_before, tiles_before)
            role(means, tall, (row, col, row, col), target, span)
            steps_before += steps
            tiles_before += 1
            tile += gl.num_programs(0)
        first_tile += tiles
        first_step += steps
        start = end
