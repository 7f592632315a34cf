"""SwiGLU from its joint projection, keeping nothing for the backward pass but the projection.

The output is recomputed there. The forms that end in ``_tiles`` stand between products in FP8 and
keep the projection in FP8 as well (paper 3.3.3): no gradient flows through them, an operation that
owns both projections calls them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import call, runs_cpu_kernel, runs_kernel
from whalefall.ops.quantize import (
    TILE,
    Tiles,
    dequantize,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)


def swiglu(
    gate_up: Float[Tensor, "rows twice"], weights: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up of rows that hold [gate, up], times each row's weight (arXiv 2002.05202)."""
    if runs_cpu_kernel(gate_up, weights):
        from whalefall.kernels.cpu import experts as cpu_kernel

        return cpu_kernel.swiglu(gate_up, weights)
    return call(_SwiGLU, gate_up, weights)


def swiglu_tiles(
    gate_up: Float[Tensor, "rows twice"],
    weights: Float[Tensor, "rows"] | None = None,
    *,
    keep: bool,
    power_of_two: bool = False,
) -> tuple[Tiles, Tiles | None]:
    """``quantize_tiles`` of ``swiglu`` and, to keep, of ``gate_up``; in BF16 on CUDA in one read.

    Both are made of ``gate_up`` as it comes. The backward pass has only what was kept, so it takes
    the gradient at a rounded point (paper 3.3.3): each number is off by at most 2^-4 of itself or
    2^-17 of the largest of its tile.

    Raises ValueError if it is to keep and ``inner`` is no multiple of 128 (see below).
    """
    if keep:
        _require_whole_tiles(gate_up.shape[1] // 2)
    if runs_kernel(gate_up) and gate_up.dtype == torch.bfloat16:
        from whalefall.kernels import swiglu_tiles as kernel

        out, kept = kernel.forward(gate_up, weights, keep, power_of_two)
        return Tiles(*out), None if kept is None else Tiles(*kept)
    return (
        quantize_tiles(forward(gate_up, weights), power_of_two=power_of_two),
        quantize_tiles(gate_up, power_of_two=power_of_two) if keep else None,
    )


def swiglu_backward_tiles(
    grad: Float[Tensor, "rows inner"],
    kept: Tiles,
    weights: Float[Tensor, "rows"] | None = None,
    ends: Int[Tensor, "groups"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Tiles, Tiles, Tiles, Float[Tensor, "rows"] | None]:
    """All that the products around a SwiGLU want of its backward pass; in BF16 on CUDA in one read.

    ``kept`` is gate_up, dequantized in FP32. With g the gradient of gate_up there, rounded to the
    type of ``grad``: ``quantize_both`` of g, ``quantize_transposed`` of the output of ``swiglu``,
    rounded likewise, and the gradient of the weights. The one-read form has the same scales and the
    same numbers, but for those halfway between two of FP8, which may become either. ``ends`` as in
    these: rows from ``ends[-1]`` on belong to nobody, and what they get is undefined.

    Raises ValueError unless ``inner`` is a multiple of 128: a tile of gate_up or of g must not hold
    both kinds.
    """
    _require_whole_tiles(grad.shape[1])
    if runs_kernel(grad) and grad.dtype == torch.bfloat16:
        from whalefall.kernels import swiglu_tiles as kernel

        pair = (kept.values, kept.scales)
        *tiles, grad_weights = kernel.backward(grad, pair, weights, ends, power_of_two)
        straight, turned, out = (Tiles(*pair) for pair in tiles)
        return straight, turned, out, grad_weights
    gate_up = dequantize(kept, torch.promote_types(grad.dtype, torch.float32))
    grad_gate_up, grad_weights = backward(grad.to(gate_up.dtype), gate_up, weights)
    grad_gate_up, activated = grad_gate_up.to(grad.dtype), forward(gate_up, weights).to(grad.dtype)
    straight, turned = quantize_both(grad_gate_up, ends, power_of_two=power_of_two)
    out = quantize_transposed(activated, ends, power_of_two=power_of_two)
    return straight, turned, out, grad_weights


def reference(
    gate_up: Float[Tensor, "rows twice"], weights: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, "rows inner"]:
    """The definition, in the type of its inputs."""
    gate, up = gate_up.chunk(2, -1)
    out = gate * gate.sigmoid() * up
    return out if weights is None else out * weights.unsqueeze(1)


def _require_whole_tiles(inner: int) -> None:
    if inner % TILE:
        raise ValueError(
            f"moe_intermediate_size must be a multiple of {TILE} for FP8, so that no tile of "
            f"{TILE} columns spans gate and up; it is {inner}"
        )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return forward(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return backward(grad, *ctx.saved_tensors)


def forward(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """``swiglu`` within an operation that has a backward pass of its own."""
    if runs_kernel(gate_up):
        from whalefall.kernels import swiglu as kernel

        return kernel.forward(gate_up, weights)
    gate, up = gate_up.split_with_sizes([gate_up.shape[-1] // 2] * 2, -1)
    out = F.silu(gate).mul_(up)
    return out if weights is None else out.mul_(weights.unsqueeze(1))


def backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``gate_up`` and of the weights, for such an operation."""
    if runs_kernel(grad, gate_up):
        from whalefall.kernels import swiglu as kernel

        return kernel.backward(grad, gate_up, weights)
    if runs_cpu_kernel(grad, gate_up, weights):
        from whalefall.kernels.cpu import experts as cpu_kernel

        return cpu_kernel.swiglu_backward(grad, gate_up, weights)
    gate, up = gate_up.chunk(2, -1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    activated, grad_weights = F.silu(gate), None
    if weights is not None:
        grad_weights = torch.linalg.vecdot(grad, activated * up).to(weights.dtype)
        grad = grad * weights.unsqueeze(1).to(grad.dtype)
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up, grad_weights
