"""Linear layers whose products run in FP8, dense or grouped by expert (paper 3.3).

A linear layer has three products, and each contracts another dimension:

    fprop   y  = x W^T      over in        x in 1x128 tiles,     W in 128x128 blocks
    dgrad   dx = dy W       over out       dy in 1x128 tiles,    W^T in 128x128 blocks
    wgrad   dW = dy^T x     over tokens    dy^T and x^T in 1x128 tiles (128x1 tiles of dy and x)

FP8 tensor cores want both operands contiguous along the contracted dimension, so x and dy are
quantized twice, from one read. Of x only the transposed form is kept for the backward pass: one
byte a number, and rounded once, where a kept row form would be rounded again (the paper's way).
Weights are cast once an optimizer step, however many micro-batches it has. The gradients dy are
never quantized in 128x128 blocks: that diverges (paper appendix B.2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import call
from whalefall.ops.gemm import gemm, gemm_wgrad
from whalefall.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from whalefall.ops.grouped_linear import grouped_linear, grouped_weight_gradient
from whalefall.ops.quantize import (
    Blocks,
    Tiles,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)


@dataclass(frozen=True)
class Recipe:
    """Which products run in FP8; the others have the type of their operands."""

    fprop: bool
    dgrad: bool
    wgrad: bool
    power_of_two: bool = False
    """Scales are rounded up to powers of two."""

    @property
    def is_complete(self) -> bool:
        return self.fprop and self.dgrad and self.wgrad


class WeightCast:
    """The FP8 forms of a weight and its transpose, made anew when the weight has changed.

    Several weights are one, their rows under one another. A change is seen by the version that
    every operation in place counts up; writes through ``.data`` hide from it.
    """

    def __init__(self) -> None:
        self._made_of: tuple[Recipe, list[tuple[int, int]]] | None = None

    def __call__(self, weights: Sequence[Tensor], recipe: Recipe) -> tuple[Blocks, Blocks]:
        state = (recipe, [(weight.data_ptr(), weight._version) for weight in weights])
        if state != self._made_of:
            whole = stacked(weights).detach()
            self._blocks = quantize_blocks_both(whole, power_of_two=recipe.power_of_two)
            self._made_of = state
        return self._blocks


def fp8_linear(
    x: Float[Tensor, "tokens in"],
    weights: Sequence[Float[Tensor, "*groups _ in"]],
    cast: WeightCast,
    recipe: Recipe,
    ends: Int[Tensor, "groups"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """x W^T by ``recipe``; with ``ends``, row i by the weight of its group (``grouped_linear``).

    Several weights are one product, their outputs side by side. The result has the type of ``x``.
    ``in`` and every ``out`` are multiples of 16.
    """
    reads_blocks = recipe.fprop or recipe.dgrad
    blocks = cast(weights, recipe) if reads_blocks else (None, None)
    return call(_Fp8Linear, x, *blocks, recipe, ends, *weights)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        blocks: Blocks | None,
        transposed: Blocks | None,
        recipe: Recipe,
        ends: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        needs_wgrad = any(ctx.needs_input_grad[5:])
        rows, columns = quantized(
            x, ends, recipe, as_rows=recipe.fprop, as_columns=recipe.wgrad and needs_wgrad
        )
        kept = (x,) if columns is None and needs_wgrad else ()
        ctx.save_for_backward(ends, *weights, *kept, *tensors_of(columns))
        ctx.transposed, ctx.recipe, ctx.dtype, ctx.count = transposed, recipe, x.dtype, len(weights)
        if rows is not None:
            assert blocks is not None
            return product(rows, blocks, ends, x.dtype)
        weight = stacked(weights)
        return F.linear(x, weight) if ends is None else grouped_linear(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ends, *kept = ctx.saved_tensors
        weights, kept = kept[: ctx.count], kept[ctx.count :]
        recipe: Recipe = ctx.recipe
        needs_dgrad, needs_wgrad = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        rows, columns = quantized(
            grad,
            ends,
            recipe,
            as_rows=recipe.dgrad and needs_dgrad,
            as_columns=recipe.wgrad and needs_wgrad,
        )
        grad_x = grad_weight = None
        if rows is not None:
            grad_x = product(rows, ctx.transposed, ends, ctx.dtype)
        elif needs_dgrad:
            weight = stacked(weights)
            grad_x = grad @ weight if ends is None else grouped_linear(grad, weight.mT, ends)
        if columns is not None:
            grad_weight = weight_product(columns, Tiles(*kept), ends, weights[0].dtype)
        elif needs_wgrad:
            (x,) = kept
            grad_weight = grad.T @ x if ends is None else grouped_weight_gradient(grad, x, ends)
        return grad_x, None, None, None, None, *apart(grad_weight, weights)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def apart(gradient: Tensor | None, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of stacked weights, of each of them."""
    if gradient is None or len(weights) == 1:
        return [gradient] * len(weights)
    return gradient.split([len(weight) for weight in weights])


def quantized(
    x: Tensor, ends: Tensor | None, recipe: Recipe, *, as_rows: bool, as_columns: bool
) -> tuple[Tiles | None, Tiles | None]:
    """The wanted forms of x: 1x128 tiles, and those of its transpose."""
    power_of_two = recipe.power_of_two
    if as_rows and as_columns:
        return quantize_both(x, ends, power_of_two=power_of_two)
    return (
        quantize_tiles(x, power_of_two=power_of_two) if as_rows else None,
        quantize_transposed(x, ends, power_of_two=power_of_two) if as_columns else None,
    )


def product(
    a: Tiles, b: Blocks, ends: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "rows out"]:
    """fprop and dgrad."""
    return gemm(a, b, dtype) if ends is None else grouped_gemm(a, b, ends, dtype)


def weight_product(
    a: Tiles, b: Tiles, ends: Tensor | None, dtype: torch.dtype
) -> Float[Tensor, "*groups out in"]:
    """wgrad."""
    return gemm_wgrad(a, b, dtype) if ends is None else grouped_gemm_wgrad(a, b, ends, dtype)


def tensors_of(tiles: Tiles | None) -> Iterator[Tensor]:
    """What ``Tiles(*...)`` is made of, to be saved for a backward pass."""
    if tiles is not None:
        yield from (tiles.values, tiles.scales)
