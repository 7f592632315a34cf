"""The routed experts with every product in FP8 and nothing between them in BF16 that need not be.

The same arithmetic as ``fp8_linear``, ``swiglu``, ``fp8_linear``, with the quantization inside
SwiGLU's own passes: its output and its gradient are written as FP8 tiles and nothing else. Kept for
the backward pass, in FP8, are the transposed input and SwiGLU's input, from which its output is
made again (paper 3.3.3). So the forward pass has the bits of these parts. The gradients have those
of parts whose SwiGLU looks at its input, in the backward pass only, as rounded to FP8.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.fp8_linear import Recipe, WeightCast, quantized, tensors_of
from whalefall.ops.function import call
from whalefall.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from whalefall.ops.quantize import Blocks, Tiles
from whalefall.ops.swiglu import swiglu_backward_tiles, swiglu_tiles


def fp8_experts(
    rows: Float[Tensor, "pairs hidden"],
    weights: Float[Tensor, "pairs"],
    ends: Int[Tensor, "experts"],
    gate_up_proj: Float[Tensor, "experts twice hidden"],
    down_proj: Float[Tensor, "experts hidden inner"],
    casts: tuple[WeightCast, WeightCast],
    recipe: Recipe,
) -> Float[Tensor, "pairs hidden"]:
    """down(weight * swiglu(gate_up(row))) of rows sorted by expert (see ``grouped_linear``).

    All three products of both projections run in FP8. ``inner`` is a multiple of 128.
    """
    up, down = (
        cast([weight], recipe)
        for cast, weight in zip(casts, (gate_up_proj, down_proj), strict=True)
    )
    return call(_Fp8Experts, rows, weights, ends, gate_up_proj, down_proj, up, down, recipe)


class _Fp8Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        ends: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        up: tuple[Blocks, Blocks],
        down: tuple[Blocks, Blocks],
        recipe: Recipe,
    ) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        x, x_columns = quantized(rows, ends, recipe, as_rows=True, as_columns=keeps)
        assert x is not None
        gate_up = grouped_gemm(x, up[0], ends, rows.dtype)
        activated, kept = swiglu_tiles(
            gate_up, weights, keep=keeps, power_of_two=recipe.power_of_two
        )
        ctx.save_for_backward(weights, ends, *tensors_of(kept), *tensors_of(x_columns))
        ctx.up, ctx.down, ctx.recipe, ctx.dtype = up[1], down[1], recipe, gate_up_proj.dtype
        return grouped_gemm(activated, down[0], ends, rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, ends, values, scales, *x_columns = ctx.saved_tensors
        out, out_columns = quantized(grad, ends, ctx.recipe, as_rows=True, as_columns=True)
        assert out is not None and out_columns is not None
        grad_activated = grouped_gemm(out, ctx.down, ends, grad.dtype)
        grad_gate_up, grad_columns, activated_columns, grad_weights = swiglu_backward_tiles(
            grad_activated,
            Tiles(values, scales),
            weights,
            ends,
            power_of_two=ctx.recipe.power_of_two,
        )
        grad_rows = grouped_gemm(grad_gate_up, ctx.up, ends, grad.dtype)
        grad_up = grouped_gemm_wgrad(grad_columns, Tiles(*x_columns), ends, ctx.dtype)
        grad_down = grouped_gemm_wgrad(out_columns, activated_columns, ends, ctx.dtype)
        return grad_rows, grad_weights, None, grad_up, grad_down, None, None, None
