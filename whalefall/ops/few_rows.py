"""The experts of a decode step, where each has few rows and reading its weights is the time.

Two kernels: tokens are read where they are, gate and up together, SwiGLU and the rows' weights at
once; then the last projection. Weights are BF16, or FP8 blocks as checkpoints hold them, which are
multiplied as the BF16 numbers they are: activations are never rounded to FP8, and no copy of the
weights is made. For inference: no gradient flows through.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.grouped_linear import reference as grouped_reference
from whalefall.ops.quantize import Blocks, dequantize
from whalefall.ops.swiglu import swiglu

_FEW, _FEW_ON_CPU = 64, 8
"""Rows of an expert, on average, up to which its weights are the time."""
_SMALL = 1 << 23
"""Numbers of all experts up to which one core of a CPU is to work on them."""


class Weight(NamedTuple):
    """A weight or several: numbers, or values of FP8 E4M3 and the scales of 128x128 blocks."""

    values: Float[Tensor, "*groups out in"]
    scales: Float32[Tensor, "*groups out_blocks in_blocks"] | None = None
    """Where ``out`` holds gate and up, the blocks of each begin with it."""


def few_rows(
    x: Float[Tensor, "tokens hidden"],
    row_tokens: Int[Tensor, "pairs"],
    row_weights: Float[Tensor, "pairs"],
    ends: Int[Tensor, "experts"],
    gate_up: Weight,
    down: Weight,
    *,
    block_rows: int | None = None,
) -> Float[Tensor, "rows hidden"]:
    """down(weight * swiglu(gate_up(x[token]))) of rows sorted by expert.

    Rows are as ``gate`` sorts them. Weights may hold one expert more than there are ends: all
    tokens go to that one, unweighted, and their rows follow.

    The experts' rows are multiplied ``block_rows`` at a time (16, 32 or 64 on CUDA, 1 on a CPU),
    chosen by their number. Where it is given, a row's bits do not depend on what other rows there
    are.
    """
    if runs_few_rows(x, gate_up, down):
        from whalefall.kernels import few_rows as kernel

        pairs = len(row_tokens)
        average = pairs / max(1, min(pairs, len(ends)))
        block_rows = block_rows or fitting_block(average * 4 / 3)  # so that most groups are one
        activated = kernel.up(x, row_tokens, row_weights, ends, *gate_up, block_rows)
        return kernel.down(activated, pairs, ends, *down, block_rows)
    if _runs_cpu_kernel(x, gate_up, down) and row_weights.dtype == x.dtype:
        from whalefall.kernels.cpu import experts as cpu_kernel

        order = row_tokens.long().contiguous(), row_weights.contiguous(), ends.int().contiguous()
        held = gate_up.values, down.values
        return cpu_kernel.few_rows(x, *order, *held, row_by_row=block_rows is not None)
    rows, weights, ends = _all_rows(x, row_tokens, row_weights, ends, len(gate_up.values))
    activated = swiglu(grouped_linear(rows, decoded(gate_up, x.dtype, parts=2), ends), weights)
    return grouped_linear(activated, decoded(down, x.dtype), ends)


def reference(
    x: Float[Tensor, "tokens hidden"],
    row_tokens: Int[Tensor, "pairs"],
    row_weights: Float[Tensor, "pairs"],
    ends: Int[Tensor, "experts"],
    gate_up: Weight,
    down: Weight,
) -> Float[Tensor, "rows hidden"]:
    """The definition, in the type of ``x``."""
    rows, weights, ends = _all_rows(x, row_tokens, row_weights, ends, len(gate_up.values))
    gate, up = grouped_reference(rows, decoded(gate_up, x.dtype, parts=2), ends).chunk(2, 1)
    activated = gate * gate.sigmoid() * up * weights[:, None]
    return grouped_reference(activated, decoded(down, x.dtype), ends)


def are_few(pairs: int, x: Tensor, *weights: Weight) -> bool:
    """Whether ``few_rows`` is the fastest way for so many rows of experts with these weights."""
    experts = len(weights[0].values)
    if runs_few_rows(x, *weights):
        return pairs <= _FEW * experts
    is_small = sum(values.numel() for values, _ in weights) <= _SMALL
    return pairs <= _FEW_ON_CPU * experts and is_small and _runs_cpu_kernel(x, *weights)


def fixed_block(x: Tensor, *weights: Weight) -> int | None:
    """Rows to multiply at a time for bits that do not depend on how many there are.

    None where no kernel of ours takes these.
    """
    if runs_few_rows(x, *weights):
        return 16
    return 1 if _runs_cpu_kernel(x, *weights) else None


def runs_few_rows(x: Tensor, *weights: Weight) -> bool:
    """Whether our kernels take these: BF16 on CUDA, rows of weights in whole 16 bytes (TMA)."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and all(
            values.dtype == (torch.bfloat16 if scales is None else torch.float8_e4m3fn)
            and values.shape[-1] * values.itemsize % 16 == 0
            for values, scales in weights
        )
    )


def _runs_cpu_kernel(x: Tensor, *weights: Weight) -> bool:
    return all(scales is None and runs_cpu_kernel(x, values) for values, scales in weights)


def fitting_block(rows: int | float) -> int:
    """How many rows to multiply at a time, where there are so many."""
    return next((block for block in (16, 32) if rows <= block), 64)


def decoded(weight: Weight, dtype: torch.dtype, *, parts: int = 1) -> Float[Tensor, "*groups _ in"]:
    """The numbers that a weight stands for; blocks begin anew with each of its ``parts``."""
    values, scales = weight
    if scales is None:
        return values.to(dtype)
    apart = (tensor.unflatten(-2, (parts, -1)) for tensor in (values, scales.float()))
    return dequantize(Blocks(*apart), dtype).flatten(-3, -2)


def _all_rows(
    x: Tensor, row_tokens: Tensor, row_weights: Tensor, ends: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their weights and the ends, with those of the group that takes all tokens."""
    rows = x.index_select(0, row_tokens)
    if groups == len(ends):
        return rows, row_weights, ends
    return (
        torch.cat([rows, x]),
        torch.cat([row_weights, row_weights.new_ones(len(x))]),
        torch.cat([ends, ends.new_full((1,), len(rows) + len(x))]),
    )
