"""RMSNorm: torch's fused kernel on CUDA; elsewhere a backward of half the passes."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import call


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The mean is taken in FP32 for lower precisions; the result has the type of ``x``.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return call(_RMSNorm, x, weight, eps)


def reference(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """The definition, in the type of its inputs."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        normed = wide * scale
        grad_weight = (grad * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1).div_(x.shape[-1])
        grad_x = torch.addcmul(grad, normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None
