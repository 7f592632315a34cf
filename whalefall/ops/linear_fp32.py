"""A linear layer whose result is FP32, from operands of any type: the gate's (paper 3.3.1).

The product of two BF16 numbers is exact in FP32, so on CUDA the tensor cores multiply BF16
operands and sum in FP32: nothing is lost, and no operand is copied to FP32. Elsewhere the operands
are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor


def linear_fp32(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]
) -> Float32[Tensor, "rows out"]:
    """x @ weight^T in FP32; gradients have the operands' types."""
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
        return _LinearBF16.apply(x, weight)
    return F.linear(x.float(), weight.float())


class _LinearBF16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The FP32 gradient enters as two BF16 numbers, [rows, 2 x out]: it and what it lost.

        Together they keep 16 bits of it, eight more than the BF16 results have; the sum over both
        halves is the product's own, in FP32.
        """
        x, weight = ctx.saved_tensors
        halves = grad.new_empty(len(grad), 2, len(weight), dtype=torch.bfloat16)
        halves[:, 0] = grad
        torch.sub(grad, halves[:, 0], out=halves[:, 1])
        halves = halves.flatten(1)
        grad_x = torch.mm(halves, weight.repeat(2, 1))
        of_halves = torch.mm(halves.T, x, out_dtype=torch.float32)
        return grad_x, of_halves.unflatten(0, (2, -1)).sum(0).to(weight.dtype)
