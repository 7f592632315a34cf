"""A linear layer per group of rows: the experts' matrix products (paper 2.1.2).

Rows arrive sorted by group; ``ends[g]`` is the row after the last one of group g. Rows from
``ends[-1]`` on belong to nobody and their results are undefined. On CUDA the ends are read on the
device, so nothing waits for the host: BF16 whose rows are a multiple of 16 bytes goes to our
kernel on Hopper, elsewhere to the library's grouped GEMM. All else takes a loop over the groups
that have rows, which does the same arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalefall.kernels.device import is_hopper
from whalefall.ops.function import call
from whalefall.ops.squares import keep_squares


def grouped_linear(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "groups out in"],
    ends: Int[Tensor, "groups"],
) -> Float[Tensor, "rows out"]:
    """x[i] @ weight[group of i]^T for every row. Groups may be empty."""
    return call(_GroupedLinear, x, weight, ends)


def grouped_weight_gradient(
    grad: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], ends: Int[Tensor, "groups"]
) -> Float[Tensor, "groups out in"]:
    """grad^T x over the rows of each group; zeros for an empty one."""
    if _has_grouped_gemm(x, grad, grad.shape[1]):
        if is_hopper(x.device):
            from whalefall.kernels import grouped_linear as kernel

            gradient, squares = kernel.weight_gradient(grad, x, ends)
            keep_squares(gradient, squares)
            return gradient
        return F.grouped_mm(grad.T, x, offs=ends)
    out = x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    for group, start, end in _non_empty(ends):
        torch.mm(grad[start:end].T, x[start:end], out=out[group])
    return out


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
    """One backward for all: autograd over the loop's slices would copy the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _product(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()  # grouped GEMMs take no other strides
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.mT, ends)
        if ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(grad, x, ends)
        return grad_x, grad_weight, None


def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x[i] weight[group of i]^T, without a copy of a weight that is a transpose."""
    if _has_grouped_gemm(x, weight, weight.shape[1]):
        if is_hopper(x.device):
            from whalefall.kernels import grouped_linear as kernel

            return kernel.linear(x, weight, ends)
        return F.grouped_mm(x, weight.mT, offs=ends)
    bounds = _non_empty(ends)
    out = x.new_empty(len(x), weight.shape[1])
    sizes = [end - start for _, start, end in bounds]
    sizes.append(len(x) - sum(sizes))  # nobody's
    parts = zip(bounds, x.split_with_sizes(sizes), out.split_with_sizes(sizes), strict=False)
    transposed = weight.mT
    for (group, _, _), rows, products in parts:
        torch.mm(rows, transposed[group], out=products)
    return out


def _has_grouped_gemm(x: Tensor, other: Tensor, out_features: int) -> bool:
    aligned = x.shape[1] % 8 == 0 and out_features % 8 == 0
    return x.is_cuda and x.dtype == other.dtype == torch.bfloat16 and aligned


def _non_empty(ends: Tensor) -> list[tuple[int, int, int]]:
    bounds, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            bounds.append((group, start, end))
        start = end
    return bounds
