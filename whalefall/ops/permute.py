"""Move tokens to their experts and back: a gather, and its transpose.

``order`` lists the (token, choice) pairs sorted by expert; pair p belongs to token p // top_k.
Each direction is the other's gradient, and both gather: the sums have a fixed order, so the
result is the same from run to run, which scattering with atomics is not. A single token, the case
of decoding, needs no indices.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import call


def permute(
    x: Float[Tensor, "tokens hidden"], order: Int[Tensor, "pairs"], top_k: int
) -> Float[Tensor, "pairs hidden"]:
    """One row per (token, choice), sorted by expert."""
    return call(_Permute, x, order, top_k)


def unpermute(
    rows: Float[Tensor, "pairs hidden"], order: Int[Tensor, "pairs"], top_k: int
) -> Float[Tensor, "tokens hidden"]:
    """Each token's ``top_k`` rows summed."""
    return call(_Unpermute, rows, order, top_k)


def _gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    if len(x) == 1:
        return x.repeat(top_k, 1)
    return x.index_select(0, order.div(top_k, rounding_mode="floor"))


def _gather_sum(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    if len(rows) == top_k:
        return rows.sum(0, keepdim=True)
    pairs = torch.arange(len(order), device=order.device)
    row_of_pair = torch.empty_like(order).scatter_(0, order, pairs)
    # A bag of rows is gathered and summed in one pass, without a copy of [pairs, hidden].
    return torch.embedding_bag(rows, row_of_pair, pairs[::top_k])[0]


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _gather(x, order, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _gather_sum(grad, order, ctx.top_k), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _gather_sum(rows, order, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _gather(grad, order, ctx.top_k), None, None
