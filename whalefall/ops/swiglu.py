"""SwiGLU from its joint projection, keeping nothing for the backward pass but the projection.

The output is recomputed there (paper 3.3.2 keeps the inputs of SwiGLU for the same reason).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import call


def swiglu(
    gate_up: Float[Tensor, "rows twice"], weights: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up of rows that hold [gate, up], times each row's weight (arXiv 2002.05202)."""
    return call(_SwiGLU, gate_up, weights)


def reference(
    gate_up: Float[Tensor, "rows twice"], weights: Float[Tensor, "rows"] | None = None
) -> Float[Tensor, "rows inner"]:
    """The definition, in the type of its inputs."""
    gate, up = gate_up.chunk(2, -1)
    out = gate * gate.sigmoid() * up
    return out if weights is None else out * weights.unsqueeze(1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.split_with_sizes([gate_up.shape[-1] // 2] * 2, -1)
        out = F.silu(gate).mul_(up)
        return out if weights is None else out.mul_(weights.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
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
