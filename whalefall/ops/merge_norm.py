"""The end of a block and the beginning of the next: routed and shared experts, residual, norm.

For inference: no gradient flows through. On CUDA all is one kernel.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel, runs_kernel
from whalefall.ops.permute import gather_sum
from whalefall.ops.rms_norm import reference as norm
from whalefall.ops.rms_norm import rms_norm


def merge_norm(
    residual: Float[Tensor, "tokens hidden"],
    rows: Float[Tensor, "pairs hidden"],
    places: Int[Tensor, "tokens top_k"],
    shared: Float[Tensor, "tokens hidden"] | None,
    weight: Float[Tensor, "hidden"],
    eps: float,
) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
    """residual + the sum of rows ``places[t]`` + shared, and the RMSNorm of it.

    ``rows`` are the experts' weighted outputs. Both results have the type of ``residual``; what is
    normed is the sum as it is stored. On CUDA that is rounded once; elsewhere after each term.
    """
    if runs_kernel(residual, rows, weight):
        from whalefall.kernels import merge_norm as kernel

        return kernel.forward(residual, rows, places, shared, weight, eps)
    is_plain = runs_cpu_kernel(residual, rows, weight, shared)
    if is_plain and runs_cpu_kernel(places, dtype=torch.int64):
        from whalefall.kernels.cpu import norm

        return norm.merge_norm(residual, rows, places, shared, weight, eps)
    total = residual + gather_sum(rows, places)
    total = total if shared is None else total.add_(shared)
    return total, rms_norm(total, weight, eps)


def reference(
    residual: Float[Tensor, "tokens hidden"],
    rows: Float[Tensor, "pairs hidden"],
    places: Int[Tensor, "tokens top_k"],
    shared: Float[Tensor, "tokens hidden"] | None,
    weight: Float[Tensor, "hidden"],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The definition, in the type of its inputs."""
    total = residual + rows[places].sum(1) + (0 if shared is None else shared)
    return total, norm(total, weight, eps)
