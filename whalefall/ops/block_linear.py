"""Linear layers whose weights are FP8 blocks, held as checkpoints hold them: inference.

The number of rows decides how they are multiplied. Up to ``STREAMED`` the time is the time to read
the weights: they become BF16 in registers (W8A16), and only they are rounded. Beyond, arithmetic
is: activations are rounded to FP8 in 1x128 tiles, and the product is that of training (W8A8, paper
3.3.2). No gradient flows through. Elsewhere than on CUDA, and for sizes that the kernels do not
take, the weights are dequantized each time.
"""

import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

from whalefall.ops.few_rows import Weight, decoded, fitting_block, runs_few_rows
from whalefall.ops.gemm import FP8_ALIGNMENT, gemm
from whalefall.ops.grouped_gemm import grouped_gemm
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.quantize import TILE, Blocks, quantize_tiles
from whalefall.ops.swiglu import swiglu, swiglu_tiles

STREAMED = 256
"""Rows up to which a projection is multiplied in BF16."""
WAITING = 16
"""Rows up to which it waits for bytes longer than it reads or multiplies them."""


def block_linear(
    x: Float[Tensor, "rows in"],
    weight: Float8e4m3fn[Tensor, "out in"],
    scale: Float32[Tensor, "out_blocks in_blocks"],
    *,
    block_rows: int | None = None,
) -> Float[Tensor, "rows out"]:
    """x W^T. With ``block_rows`` (16, 32, 64) always in BF16, so many rows at a time: then a row's
    bits do not depend on the others."""
    held = Weight(weight, scale)
    if runs_few_rows(x, held) and (block_rows or len(x) <= STREAMED):
        return streamed_linear(x, held, block_rows)
    if runs_few_rows(x, held) and len(weight) % FP8_ALIGNMENT == 0:
        return gemm(quantize_tiles(x), _blocks(held), x.dtype)
    return F.linear(x, decoded(held, x.dtype))


def streamed_linear(
    x: Float[Tensor, "rows in"], weight: Weight, block_rows: int | None
) -> Float[Tensor, "rows out"]:
    """x W^T of few rows, or of any ``block_rows`` at a time.

    Only where ``fixed_block`` finds a kernel: in BF16 on CUDA, also of FP8 blocks, and in FP32 on a
    CPU, row by row.
    """
    values, scales = weight
    if x.is_cpu:
        from whalefall.kernels.cpu import linear as cpu_kernel

        return cpu_kernel.linear(x.contiguous(), values, row_by_row=True)
    if block_rows is None and len(x) > WAITING:
        from whalefall.kernels import few_rows

        # Tiles of few rows rather than of all: the others find the weight in L2.
        scales = None if scales is None else scales[None]
        return few_rows.down(x, 0, None, values[None], scales, fitting_block(len(x) / 4))
    from whalefall.kernels import block_linear as kernel

    return kernel.forward(x, values, scales, block_rows or WAITING)


def block_experts(
    rows: Float[Tensor, "pairs hidden"],
    weights: Float[Tensor, "pairs"],
    ends: Int[Tensor, "experts"],
    gate_up: Weight,
    down: Weight,
) -> Float[Tensor, "pairs hidden"]:
    """down(weight * swiglu(gate_up(row))) of many rows by expert (see ``grouped_linear``)."""
    inner = down.values.shape[2]
    if runs_few_rows(rows, gate_up, down) and inner % TILE == 0:
        joint = grouped_gemm(quantize_tiles(rows), _blocks(gate_up), ends, rows.dtype)
        activated, _ = swiglu_tiles(joint, weights, keep=False)
        return grouped_gemm(activated, _blocks(down), ends, rows.dtype)
    joint = grouped_linear(rows, decoded(gate_up, rows.dtype, parts=2), ends)
    return grouped_linear(swiglu(joint, weights), decoded(down, rows.dtype), ends)


def reference(
    x: Float[Tensor, "rows in"],
    weight: Float8e4m3fn[Tensor, "out in"],
    scale: Float32[Tensor, "out_blocks in_blocks"],
) -> Float[Tensor, "rows out"]:
    """The definition, in the type of ``x``."""
    return x @ decoded(Weight(weight, scale), x.dtype).T


def _blocks(weight: Weight) -> Blocks:
    """As the products of training want them: scales filled up to a multiple of 4, for cuBLAS."""
    values, scales = weight
    assert scales is not None
    return Blocks(values, F.pad(scales, (0, -scales.shape[-1] % 4), value=1.0))
