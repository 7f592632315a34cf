"""Matrix products of FP8 operands by groups of rows: the experts' linear layers (paper 3.3.2).

Rows arrive sorted by group; ``ends[g]`` is the row after the last one of group g. Groups may be
empty, begin at any row, and end before the rows do. As in ``gemm``, sums leave the tensor core
every 128 of the contraction and are FP32 from there on. Nothing waits for the host.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.gemm import check_sizes
from whalefall.ops.quantize import TILE, Blocks, Tiles, dequantize
from whalefall.ops.squares import keep_squares


def grouped_gemm(
    a: Tiles, b: Blocks, ends: Int[Tensor, "groups"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "rows cols"]:
    """a[i] b[group of i]^T for every row, from [rows, inner] and [groups, cols, inner].

    Rows from ``ends[-1]`` on are undefined. Raises ``ValueError`` for ``inner`` or ``cols`` that
    are no multiple of 16.
    """
    check_sizes(inner=a.values.shape[1], cols=b.values.shape[1])
    if not a.values.is_cuda:
        return reference(a, b, ends, dtype)
    from whalefall.kernels import grouped_gemm as kernel

    return kernel.forward((a.values, a.scales), (b.values, b.scales), ends, dtype)


def grouped_gemm_wgrad(
    a: Tiles, b: Tiles, ends: Int[Tensor, "groups"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "groups rows cols"]:
    """a b^T over the tokens of each group, from [rows, padded] and [cols, padded].

    a holds the gradient of the output, b the input, both from ``quantize_transposed``, which pads
    groups to 128 tokens. Empty groups give zeros. Raises ``ValueError`` for ``rows`` or ``cols``
    that are no multiple of 16.
    """
    check_sizes(rows=len(a.values), cols=len(b.values))
    if not a.values.is_cuda:
        return reference_wgrad(a, b, ends, dtype)
    from whalefall.kernels import grouped_wgrad as kernel

    operands = (a.values, a.scales), (b.values, b.scales)
    gradient, squares = kernel.grouped_wgrad(*operands, ends, dtype)
    keep_squares(gradient, squares)
    return gradient


def reference(
    a: Tiles, b: Blocks, ends: Int[Tensor, "groups"], dtype: torch.dtype
) -> Float[Tensor, "rows cols"]:
    """The definition, in float64; rows of nobody are zero."""
    x, weight = dequantize(a, torch.float64), dequantize(b, torch.float64)
    out = x.new_zeros(len(x), weight.shape[1])
    start = 0
    for end, matrix in zip(ends.tolist(), weight, strict=True):
        out[start:end] = x[start:end] @ matrix.T
        start = end
    return out.to(dtype)


def reference_wgrad(
    a: Tiles, b: Tiles, ends: Int[Tensor, "groups"], dtype: torch.dtype
) -> Float[Tensor, "groups rows cols"]:
    """The definition, in float64."""
    grad, x = dequantize(a, torch.float64), dequantize(b, torch.float64)
    out = grad.new_zeros(len(ends), len(grad), len(x))
    start = 0
    for group, size in enumerate(ends.diff(prepend=ends.new_zeros(1)).tolist()):
        out[group] = grad[:, start : start + size] @ x[:, start : start + size].T
        start += -(-size // TILE) * TILE
    return out.to(dtype)
