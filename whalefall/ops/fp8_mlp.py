"""SwiGLU with every product in FP8: of a dense layer, and of the experts from tokens to tokens.

The same arithmetic as ``fp8_linear``, ``swiglu``, ``fp8_linear``, with nothing in BF16 between them
that need not be. SwiGLU's own passes quantize: its output and its gradient are written as FP8 tiles
and nothing else. So does the way to the experts: tokens, and the gradients of their sums, become
tiles as they are gathered, and are never copied to rows. Kept for the backward pass, in FP8, are
the transposed input and SwiGLU's input, from which its output is made again (paper 3.3.3). So the
forward pass has the bits of these parts. The gradients have those of parts whose SwiGLU looks at
its input, in the backward pass only, as rounded to FP8; of these, what is halfway between two
numbers of FP8 may become either.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalefall.ops.fp8_linear import Recipe, WeightCast, product, tensors_of, weight_product
from whalefall.ops.function import call
from whalefall.ops.permute import gather_sum
from whalefall.ops.quantize import TILE, Blocks, Tiles, quantize_both, quantize_tiles
from whalefall.ops.swiglu import swiglu_backward_tiles, swiglu_tiles

Casts = tuple[WeightCast, WeightCast]
"""Of the weights before SwiGLU, and of the one behind it."""


def suits_fp8_mlp(recipe: Recipe | None, inner: int) -> TypeGuard[Recipe]:
    """Whether all products run in FP8, and no tile spans gate and up."""
    return recipe is not None and recipe.is_complete and inner % TILE == 0


def fp8_mlp(
    x: Float[Tensor, "tokens hidden"],
    gate_proj: Float[Tensor, "inner hidden"],
    up_proj: Float[Tensor, "inner hidden"],
    down_proj: Float[Tensor, "hidden inner"],
    casts: Casts,
    recipe: Recipe,
) -> Float[Tensor, "tokens hidden"]:
    """down(silu(gate(x)) * up(x)), by a recipe that ``suits_fp8_mlp``."""
    return _run(x, (None, None, None, None), [gate_proj, up_proj], down_proj, casts, recipe)


def fp8_experts(
    x: Float[Tensor, "tokens hidden"],
    places: Int[Tensor, "tokens top_k"],
    row_tokens: Int[Tensor, "rows"],
    row_weights: Float[Tensor, "rows"],
    ends: Int[Tensor, "experts"],
    gate_up_proj: Float[Tensor, "experts twice hidden"],
    down_proj: Float[Tensor, "experts hidden inner"],
    casts: Casts,
    recipe: Recipe,
) -> Float[Tensor, "tokens hidden"]:
    """The sum over each token's rows of down(weight * swiglu(gate_up(x))) by the row's expert.

    ``places`` and ``row_tokens`` as in ``permute``, ``ends`` as in ``grouped_linear``. The recipe
    is one that ``suits_fp8_mlp``.
    """
    table = (ends, row_weights, places, row_tokens)
    return _run(x, table, [gate_up_proj], down_proj, casts, recipe)


def _run(
    x: Tensor,
    table: tuple[Tensor | None, ...],
    gate_up: Sequence[Tensor],
    down: Tensor,
    casts: Casts,
    recipe: Recipe,
) -> Tensor:
    blocks = (casts[0](gate_up, recipe), casts[1]([down], recipe))
    return call(_Fp8Mlp, x, *table, *blocks, recipe, down, *gate_up)


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ends: Tensor | None,
        row_weights: Tensor | None,
        places: Tensor | None,
        row_tokens: Tensor | None,
        up: tuple[Blocks, Blocks],
        down: tuple[Blocks, Blocks],
        recipe: Recipe,
        down_proj: Tensor,
        *gate_up: Tensor,
    ) -> Tensor:
        power_of_two, columns = recipe.power_of_two, None
        keeps = any(ctx.needs_input_grad)
        if any(ctx.needs_input_grad[8:]):
            rows, columns = quantize_both(x, ends, sources=row_tokens, power_of_two=power_of_two)
        else:
            rows = quantize_tiles(x, sources=row_tokens, power_of_two=power_of_two)
        activated, kept = swiglu_tiles(
            product(rows, up[0], ends, x.dtype), row_weights, keep=keeps, power_of_two=power_of_two
        )
        table = (ends, row_weights, places, row_tokens)
        ctx.save_for_backward(*table, *tensors_of(kept), *tensors_of(columns))
        ctx.up, ctx.down, ctx.power_of_two = up[1], down[1], power_of_two
        ctx.dtype, ctx.parts = down_proj.dtype, len(gate_up)
        out = product(activated, down[0], ends, x.dtype)
        return out if places is None else gather_sum(out, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ends, row_weights, places, row_tokens, *tiles = ctx.saved_tensors
        kept, power_of_two = Tiles(*tiles[:2]), ctx.power_of_two
        grad_columns = None
        if any(ctx.needs_input_grad[8:]):
            rows, grad_columns = quantize_both(
                grad, ends, sources=row_tokens, power_of_two=power_of_two
            )
        else:  # the weights are frozen
            rows = quantize_tiles(grad, sources=row_tokens, power_of_two=power_of_two)
        rows, grad_gate_up, activated, grad_weights = swiglu_backward_tiles(
            product(rows, ctx.down, ends, grad.dtype),
            kept,
            row_weights,
            ends,
            power_of_two=power_of_two,
        )
        grad_x = grad_down = None
        grad_up: Sequence[Tensor | None] = [None] * ctx.parts
        if ctx.needs_input_grad[0]:
            grad_x = product(rows, ctx.up, ends, grad.dtype)
            grad_x = grad_x if places is None else gather_sum(grad_x, places)
        if grad_columns is not None:
            columns = Tiles(*tiles[2:])
            grad_up = weight_product(grad_gate_up, columns, ends, ctx.dtype).chunk(ctx.parts)
            grad_down = weight_product(grad_columns, activated, ends, ctx.dtype)
        return grad_x, None, grad_weights, None, None, None, None, None, grad_down, *grad_up
