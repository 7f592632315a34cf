"""FP8 products, dense or by groups of rows: which tiles there are for ``gemm_tiles``.

A group may begin at any row, so its tiles count from its own first row. They are next to each
other in the order of tiles: what a group needs comes from device memory once, then from L2.
Arithmetic is the bound: 98,304 x 2816 x 2048 is 1.13 PFLOP for 1 GB.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whalefall.kernels import gemm_tiles
from whalefall.kernels.device import multiprocessors
from whalefall.kernels.gemm_tiles import BLOCK, OPERANDS, SCALES, STEPS


def forward(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], ends: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Row r of group g times b[g]^T: [rows, cols] from [rows, inner] and [groups, cols, inner].

    Both are values and scales, in 1x128 tiles and in 128x128 blocks. Without ``ends`` all rows are
    one group.
    """
    (a_values, a_scales), (b_values, b_scales) = a, b
    (rows, inner), (groups, cols, _) = a_values.shape, b_values.shape
    out = a_values.new_empty(rows, cols, dtype=dtype)
    if not out.numel():
        return out
    # The copy engine reads a step's scales from multiples of 16 bytes only.
    a_scales = F.pad(a_scales, (0, -rows % 4)) if rows % 4 else a_scales
    tiles = (rows // 128 + 2 * groups) * -(-cols // 256)  # at most
    _grouped_gemm_kernel[(min(tiles, multiprocessors(out.device)),)](
        TensorDescriptor.from_tensor(a_values, [128, 128], OPERANDS),
        TensorDescriptor.from_tensor(a_scales.flatten(), [128], SCALES),
        TensorDescriptor.from_tensor(b_values.flatten(0, 1), [128, 128], OPERANDS),
        TensorDescriptor.from_tensor(b_scales.flatten(), [STEPS.value], SCALES),
        ends, out, rows, groups, cols, a_scales.shape[1], -(-inner // 128),
        num_warps=4,
    )  # fmt: skip
    return out


@gluon.jit(do_not_specialize=["rows", "groups", "steps"])
def _grouped_gemm_kernel(
    a, a_scales, b, b_scales, ends, out, rows, groups, cols, scale_rows, steps
):  # fmt: skip
    sources = (a, a_scales, b, b_scales)
    strides = (scale_rows, 1, gl.cdiv(steps, 4) * 4)
    gemm_tiles.play(_walk, (ends, rows, groups, cols, steps), sources, strides, out, cols)


@gluon.jit
def _walk(role: gl.constexpr, means, problem):
    """Plays a role in this program's tiles."""
    ends, rows, groups, cols, steps = problem
    across = gl.cdiv(cols, BLOCK)
    tile = gl.program_id(0)
    first_tile = 0  # of the group
    start = 0  # its first row
    tiles_before = 0
    for group in range(groups):
        end = rows if ends is None else gl.load(ends + group)
        # Where the scales of rows can be read; up to 3 rows of others are not stored.
        top = start // 4 * 4
        down = gl.where(end > start, gl.cdiv(end - top, BLOCK), 0)
        tiles = gemm_tiles.count(down, across)
        while tile < first_tile + tiles:
            row, col, tall = gemm_tiles.find(tile - first_tile, down, across)
            row += top
            b_scale = (group * across + col // BLOCK) * (gl.cdiv(steps, 4) * 4)
            source = (row, group * cols + col, row, b_scale)
            span = (0, steps, steps * tiles_before, tiles_before)
            role(means, tall, source, (row, col, start, end), span)
            tiles_before += 1
            tile += gl.num_programs(0)
        first_tile += tiles
        start = end
