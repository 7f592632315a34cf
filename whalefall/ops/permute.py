"""Move tokens to their experts and back: a copy to each choice's row, and its transpose, their sum.

``places[t, k]`` is the row of token t's k-th choice among the rows sorted by expert; -1 if that
expert is elsewhere. ``row_tokens`` is the inverse, the token of each row; rows that belong to
nobody may name any token. Each direction is the other's gradient and needs nothing but these. The
sums have a fixed order, so the result is the same from run to run, which adding with atomics is
not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import call, runs_kernel


def sort_by_expert(
    experts: Int[Tensor, "tokens top_k"], n_experts: int
) -> tuple[Int[Tensor, "tokens top_k"], Int[Tensor, "pairs"]]:
    """``places`` (int64) and ``row_tokens`` (int32) of choices below ``n_experts``; an expert's
    rows are in token order."""
    if experts.is_cuda:
        from whalefall.kernels import permute as kernel

        return kernel.sort_by_expert(experts, n_experts)
    order, places = order_by_expert(experts)
    return places, order.div(experts.shape[1], rounding_mode="floor").int()


def order_by_expert(
    experts: Int[Tensor, "tokens top_k"],
) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "tokens top_k"]]:
    """The choice of each row, counted along all tokens, and the ``places`` of the choices."""
    order = experts.flatten().argsort(stable=True)
    # Of the few choices of a single token, sorting again is the inverse in one call.
    return order, (order.argsort() if len(experts) == 1 else _inverse(order)).view_as(experts)


def permute(
    x: Float[Tensor, "tokens hidden"],
    places: Int[Tensor, "tokens top_k"],
    row_tokens: Int[Tensor, "rows"],
) -> Float[Tensor, "rows hidden"]:
    """The token of each row. Rows that belong to nobody hold anything."""
    return call(_Permute, x, places, row_tokens)


def unpermute(
    rows: Float[Tensor, "rows hidden"],
    places: Int[Tensor, "tokens top_k"],
    row_tokens: Int[Tensor, "rows"],
) -> Float[Tensor, "tokens hidden"]:
    """``gather_sum``; in its gradient, rows that belong to nobody hold anything."""
    return call(_Unpermute, rows, places, row_tokens)


def gather_sum(
    rows: Float[Tensor, "rows hidden"], places: Int[Tensor, "tokens top_k"]
) -> Float[Tensor, "tokens hidden"]:
    """Each token's rows summed, in FP32 for lower precisions. No gradient flows through."""
    if runs_kernel(rows):
        from whalefall.kernels import permute as kernel

        return kernel.gather_sum(rows, places)
    # A bag of rows is gathered and summed in one pass, without a copy of [rows, hidden].
    here = places >= 0
    bounds = F.pad(here.sum(1).cumsum(0), (1, 0))
    return F.embedding_bag(places[here], rows, bounds, mode="sum", include_last_offset=True)


def _spread(x: Tensor, places: Tensor, row_tokens: Tensor) -> Tensor:
    if runs_kernel(x):
        from whalefall.kernels import permute as kernel

        return kernel.spread(x, places, len(row_tokens))
    return x.index_select(0, row_tokens)


def _inverse(permutation: Tensor) -> Tensor:
    index = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, index)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, row_tokens: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return _spread(x, places, row_tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gather_sum(grad, *ctx.saved_tensors), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, row_tokens: Tensor) -> Tensor:
        ctx.save_for_backward(places, row_tokens)
        return gather_sum(rows, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _spread(grad, *ctx.saved_tensors), None, None
