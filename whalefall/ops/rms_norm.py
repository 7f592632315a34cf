"""RMSNorm, alone or after the additions to the residual stream that come before it in a block.

On CUDA both are one kernel each way; elsewhere a written-out backward makes half the passes of
plain autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    deltas: Sequence[Float[Tensor, "*batch dim"]],
    weight: Float[Tensor, "dim"],
    eps: float,
    uses: int = 1,
) -> tuple[Float[Tensor, "*batch dim"], ...]:
    """``add_up`` of residual and deltas, and that sum normed, ``uses`` times.

    What is normed is the sum as it is stored; both have the type of ``residual``. The normed
    tensors are one and the same: where each goes to another reader, the readers' gradients come
    back apart, and on CUDA the kernel of the backward pass adds them as it reads them. Nothing
    may change one in place.
    """
    if runs_kernel(residual, weight, *deltas):
        return _AddRMSNormKernel.apply(weight, eps, uses, residual, *deltas)
    if len(deltas) == 1 and residual.shape == deltas[0].shape:
        (delta,) = deltas
        if runs_cpu_kernel(residual, delta, weight):
            from whalefall.kernels.cpu import norm

            total, normed = norm.add_rms_norm(residual, delta, weight, eps)
            return total, *[normed] * uses
    total = add_up(residual, *deltas)
    return total, *[rms_norm(total, weight, eps)] * uses


def add_up(
    residual: Float[Tensor, "*batch dim"], *deltas: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """The sum in the type of ``residual``; lower precisions add in FP32 and round once."""
    if not deltas:
        return residual
    if runs_kernel(residual, *deltas):
        return call(_AddUpKernel, residual, *deltas)
    total = residual.float() if residual.dtype.itemsize < 4 else residual
    for delta in deltas:
        total = total + delta
    return total.type_as(residual)


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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, x = grad.contiguous(), x.contiguous()
        if runs_cpu_kernel(grad, x, weight, scale):
            from whalefall.kernels.cpu import norm

            return *norm.backward(grad, x, weight, scale), None
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

        _, out, rstd = kernel.forward(x, (), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import rms_norm as kernel

        return *kernel.backward([grad], None, *ctx.saved_tensors), None


class _AddRMSNormKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, eps: float, uses: int, residual: Tensor, *deltas: Tensor
    ) -> tuple[Tensor, ...]:
        from whalefall.kernels import rms_norm as kernel

        total, out, rstd = kernel.forward(residual, deltas, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.delta_types = [delta.dtype for delta in deltas]
        ctx.set_materialize_grads(False)  # a reader without gradient costs nothing
        # Detached, a tensor on the same memory is none of autograd's views: each gets its own edge.
        return total, out, *(out.detach() for _ in range(uses - 1))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_sum: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import rms_norm as kernel

        grad_weight, some = None, [grad for grad in grads if grad is not None]
        if some:
            grad_sum, grad_weight = kernel.backward(some, grad_sum, *ctx.saved_tensors)
        grad_deltas = (None if grad_sum is None else grad_sum.to(t) for t in ctx.delta_types)
        return grad_weight, None, None, grad_sum, *grad_deltas


class _AddUpKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, *deltas: Tensor) -> Tensor:
        from whalefall.kernels import rms_norm as kernel

        ctx.types = [term.dtype for term in (residual, *deltas)]
        return kernel.add(residual, deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.to(dtype) for dtype in ctx.types)
