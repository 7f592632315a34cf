"""A linear layer in the type of its operands: the library's, but for few rows on a CPU."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel

_FEW, _SMALL = 32, 1 << 23
"""Rows, and numbers of a weight, up to which one core is faster than the library."""


def linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """x @ weight^T + bias."""
    is_few = x.numel() <= _FEW * x.shape[-1] and weight.numel() <= _SMALL
    if bias is None and is_few and x.shape[-1] == weight.shape[1] and runs_cpu_kernel(x, weight):
        from whalefall.kernels.cpu import linear as kernel

        return kernel.linear(x, weight)
    return F.linear(x, weight, bias)
