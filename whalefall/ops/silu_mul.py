"""SwiGLU of two projections that lie apart: decoding does not copy weights to join them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel, runs_kernel


def silu_mul(
    gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]
) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up (arXiv 2002.05202); either may be part of longer rows.

    For inference: no gradient flows through. On CUDA one kernel that rounds once.
    """
    if runs_kernel(gate, up):
        from whalefall.kernels import silu_mul as kernel

        return kernel.forward(gate, up)
    if runs_cpu_kernel(gate, up):
        from whalefall.kernels.cpu import experts as cpu_kernel

        return cpu_kernel.swiglu(torch.cat([gate, up], 1), None)
    return F.silu(gate).mul_(up)


def reference(
    gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]
) -> Float[Tensor, "rows inner"]:
    """The definition, in the type of its inputs."""
    return gate * gate.sigmoid() * up
