"""A linear layer in the type of its operands: the library's, but on a CPU.

There few rows are multiplied by a kernel of ours, and many, in training, by ``onednn``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalefall.ops.function import runs_cpu_kernel
from whalefall.ops.onednn import product, suits

_FEW, _SMALL = 32, 1 << 23
"""Rows, and numbers of a weight, up to which one core is faster than the library."""


def linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """x @ weight^T + bias."""
    if bias is not None or x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight, bias)
    is_few = x.numel() <= _FEW * x.shape[-1] and weight.numel() <= _SMALL
    if is_few and runs_cpu_kernel(x, weight):
        from whalefall.kernels.cpu import linear as kernel

        return kernel.linear(x, weight)
    if torch.is_grad_enabled() and suits(x, weight):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_weight
