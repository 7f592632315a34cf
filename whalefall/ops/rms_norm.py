"""RMSNorm, alone or after the addition to the residual stream that comes before it in a block.

On CUDA both are one kernel each way; elsewhere a written-out backward makes half the passes of
plain autograd.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import call, runs_cpu_kernel, runs_kernel


def rms_norm(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The mean is taken in FP32 for lower precisions; the result has the type of ``x``.
    """
    if runs_kernel(x, weight):
        return call(_RMSNormKernel, x, weight, eps)
    if runs_cpu_kernel(x, weight):
        from whalefall.kernels.cpu import norm

        return norm.rms_norm(x, weight, eps)
    return call(_RMSNorm, x, weight, eps)


def add_rms_norm(
    residual: Float[Tensor, "*batch dim"],
    delta: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "dim"],
    eps: float,
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
    """The sum residual + delta, and that sum normed; both in the type of ``residual``."""
    if runs_kernel(residual, delta, weight):
        return _AddRMSNormKernel.apply(residual, delta, weight, eps)
    if residual.shape == delta.shape and runs_cpu_kernel(residual, delta, weight):
        from whalefall.kernels.cpu import norm

        return norm.add_rms_norm(residual, delta, weight, eps)
    total = (residual + delta).type_as(residual)
    return total, rms_norm(total, weight, eps)


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


class _RMSNormKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from whalefall.kernels import rms_norm as kernel

        _, out, rstd = kernel.forward(x, None, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import rms_norm as kernel

        return *kernel.backward(grad, None, *ctx.saved_tensors), None


class _AddRMSNormKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from whalefall.kernels import rms_norm as kernel

        total, out, rstd = kernel.forward(residual, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.delta_type = delta.dtype
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(
        ctx: Any, grad_sum: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import rms_norm as kernel

        grad_weight = None
        if grad is not None:
            grad_sum, grad_weight = kernel.backward(grad, grad_sum, *ctx.saved_tensors)
        grad_delta = None if grad_sum is None else grad_sum.to(ctx.delta_type)
        return grad_sum, grad_delta, grad_weight, None
