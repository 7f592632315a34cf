"""SwiGLU of two projections that lie apart: decoding does not copy weights to join them."""

import torch
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import runs_kernel
from whalefall.ops.swiglu import swiglu


def silu_mul(
    gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]
) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up (arXiv 2002.05202); either may be part of longer rows.

    For inference: no gradient flows through. On CUDA one kernel that rounds once.
    """
    if runs_kernel(gate, up):
        from whalefall.kernels import silu_mul as kernel

        return kernel.forward(gate, up)
    return swiglu(torch.cat([gate, up], 1))


def reference(
    gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]
) -> Float[Tensor, "rows inner"]:
    """The definition, in the type of its inputs."""
    return gate * gate.sigmoid() * up
