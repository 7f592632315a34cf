"""A linear layer per group of rows: the experts' matrix products (paper 2.1.2).

Rows arrive sorted by group; ``ends[g]`` is the row after the last one of group g. On CUDA the
library's grouped GEMM reads the ends on the device, so nothing waits for the host; it takes BF16
whose rows are a multiple of 16 bytes. Elsewhere a loop over the groups that have rows does the
same arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import call


def grouped_linear(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "groups out in"],
    ends: Int[Tensor, "groups"],
) -> Float[Tensor, "rows out"]:
    """x[i] @ weight[group of i]^T for every row. Groups may be empty."""
    if _has_grouped_gemm(x, weight.shape[1]):
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    return call(_GroupedLinear, x, weight, ends)


def grouped_weight_gradient(
    grad: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], ends: Int[Tensor, "groups"]
) -> Float[Tensor, "groups out in"]:
    """grad^T x over the rows of each group; zeros for an empty one."""
    if _has_grouped_gemm(x, grad.shape[1]):
        return F.grouped_mm(grad.T, x, offs=ends)
    return _weight_gradient(grad, x, _non_empty(ends), len(ends))


def reference(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "groups out in"],
    ends: Int[Tensor, "groups"],
) -> Float[Tensor, "rows out"]:
    """The definition, in the type of its inputs (float64 for tests)."""
    starts = [0, *ends.tolist()[:-1]]
    parts = zip(starts, ends.tolist(), weight, strict=True)
    return torch.cat([x[start:end] @ matrix.T for start, end, matrix in parts])


class _GroupedLinear(torch.autograd.Function):
    """The loop, with gradients written in place: autograd over slices would copy the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        bounds = _non_empty(ends)
        ctx.bounds = bounds
        ctx.save_for_backward(x, weight)
        out = x.new_empty(len(x), weight.shape[1])
        sizes = [end - start for _, start, end in bounds]
        parts = zip(bounds, x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=True)
        transposed = weight.mT
        for (group, _, _), rows, products in parts:
            torch.mm(rows, transposed[group], out=products)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for group, start, end in ctx.bounds:
                torch.mm(grad[start:end], weight[group], out=grad_x[start:end])
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, x, ctx.bounds, len(weight))
        return grad_x, grad_weight, None


def _weight_gradient(
    grad: Tensor, x: Tensor, bounds: list[tuple[int, int, int]], groups: int
) -> Tensor:
    out = x.new_zeros(groups, grad.shape[1], x.shape[1])
    for group, start, end in bounds:
        torch.mm(grad[start:end].T, x[start:end], out=out[group])
    return out


def _has_grouped_gemm(x: Tensor, out_features: int) -> bool:
    aligned = x.shape[1] % 8 == 0 and out_features % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned


def _non_empty(ends: Tensor) -> list[tuple[int, int, int]]:
    bounds, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            bounds.append((group, start, end))
        start = end
    return bounds
