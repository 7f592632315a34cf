"""The gate of a decode step: from tokens to rows sorted by expert (paper 2.1.2 and 3.3.1).

What ``linear_fp32``, ``route`` and ``sort_by_expert`` do one after the other, for inference: no
gradient flows through. On CUDA it is two kernels for few tokens and three for many, and in BF16
what a token gets does not depend on how many others there are.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.block_linear import streamed_linear
from whalefall.ops.few_rows import Weight
from whalefall.ops.function import runs_cpu_kernel, runs_kernel
from whalefall.ops.linear import linear
from whalefall.ops.linear_fp32 import linear_fp32
from whalefall.ops.permute import order_by_expert
from whalefall.ops.route import route


class Sorted(NamedTuple):
    """Which experts the tokens go to, and the rows of all (token, choice) pairs by expert."""

    experts: Int[Tensor, "tokens top_k"]
    """A token's choices, on CUDA in the order of the experts."""
    weights: Float[Tensor, "tokens top_k"]
    """Share of each choice in the token's sum, FP32."""
    places: Int[Tensor, "tokens top_k"]
    """The row of each choice: what ``unpermute`` and ``merge_norm`` read."""
    ends: Int[Tensor, "experts"]
    """``ends[e]`` is the row after the last one of expert e (int32)."""
    row_tokens: Int[Tensor, "pairs"]
    """The token of each row; an expert's rows are in token order."""
    row_weights: Float[Tensor, "pairs"]
    """The weight of each row, FP32."""


def gate(
    x: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, "experts"],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
    block_rows: int | None = None,
) -> Sorted:
    """Scores, choice and sort; the options are those of ``route``.

    The product is FP32 in meaning: exact products of BF16 numbers summed in FP32, or FP32 operands.
    With ``block_rows`` what a token gets does not depend on how many others there are.
    """
    options = (top_k, n_group, topk_group, norm_topk_prob, scale)
    if runs_kernel(x, weight):
        from whalefall.kernels import gate as kernel

        is_narrow = x.dtype == weight.dtype == torch.bfloat16
        parts = kernel.logits(x, weight) if is_narrow else linear_fp32(x, weight).unsqueeze(0)
        return Sorted(*kernel.choose(parts, bias, *options))
    if runs_cpu_kernel(x, weight, bias):
        from whalefall.kernels.cpu import gate as cpu_kernel

        by_rows = block_rows is not None
        logits = streamed_linear(x, Weight(weight), 1) if by_rows else linear(x, weight)
        return Sorted(*cpu_kernel.choose(logits, bias, *options))
    experts, weights, _, loads = route(
        linear_fp32(x, weight),
        bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        scale=scale,
    )
    order, places = order_by_expert(experts)
    return Sorted(
        experts,
        weights,
        places,
        loads.cumsum(0, dtype=torch.int32),
        order.div(top_k, rounding_mode="floor"),
        weights.flatten().index_select(0, order),
    )
