"""Matrix products of FP8 operands: forward, input gradient and weight gradient of a linear layer.

Both operands have the contraction along their rows, in tiles or blocks of 128. Within 128 the
tensor core accumulates (about 14 bits); from 128 to 128 the sums are FP32, with the scales
(paper 3.3.2). On CUDA this is cuBLAS, which does exactly that on Hopper, or our kernel where that
measured faster: which of them is a rule by shape, here and nowhere else.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from whalefall.ops.quantize import Blocks, Tiles, dequantize

FP8_ALIGNMENT = 16
"""Both sides of a weight are multiples of it: rows of FP8 begin at multiples of 16 bytes."""


def gemm(a: Tiles, b: Blocks, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
    """a b^T, from [rows, inner] and [cols, inner]: the forward pass with b the weight's blocks,
    the gradient of the input with those of its transpose.

    Raises ``ValueError`` for ``inner`` or ``cols`` that are no multiple of 16.
    """
    (rows, inner), cols = a.values.shape, len(b.values)
    check_sizes(inner=inner, cols=cols)
    if not a.values.is_cuda or not rows:
        return reference(a, b, dtype)
    # cuBLAS wants a multiple of 4 rows, so that each column of their scales is aligned.
    if rows % 4 or own_is_faster(rows, cols, inner):
        return own(a, b, dtype)
    return cublas(a, b, dtype)


def gemm_wgrad(
    a: Tiles, b: Tiles, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "rows cols"]:
    """a b^T, from [rows, tokens] and [cols, tokens]: the gradient of a weight [rows, cols].

    a holds the gradient of the output, b the input, both transposed, in tiles along the tokens.
    Raises ``ValueError`` for ``rows`` or ``cols`` that are no multiple of 16.
    """
    check_sizes(rows=len(a.values), cols=len(b.values))
    if not a.values.is_cuda or not a.values.numel():
        return reference(a, b, dtype)
    return cublas(a, b, dtype)


def reference(a: Tiles, b: Tiles | Blocks, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The definition, in float64."""
    return (dequantize(a, torch.float64) @ dequantize(b, torch.float64).T).to(dtype)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size that is no multiple of ``FP8_ALIGNMENT``."""
    for name, size in sizes.items():
        if size % FP8_ALIGNMENT:
            raise ValueError(
                f"FP8 GEMMs need {name} to be a multiple of {FP8_ALIGNMENT}, not {size}"
            )


def own_is_faster(rows: int, cols: int, inner: int) -> bool:
    """Than cuBLAS, by ``benchmarks/kernels/gemm.py``: by 1 to 13 %; elsewhere up to 9 % slower."""
    return rows >= 4096 and cols >= 2048 and inner <= 1536


def own(a: Tiles, b: Blocks, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """By our kernel, of operands that are not empty."""
    from whalefall.kernels import grouped_gemm as kernel

    one_group = (b.values[None], b.scales[None])
    return kernel.forward((a.values, a.scales), one_group, None, dtype)


def cublas(a: Tiles, b: Tiles | Blocks, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """By the library, of operands that are not empty; ``rows`` is a multiple of 4."""
    scaling = ScalingType.BlockWise128x128 if isinstance(b, Blocks) else ScalingType.BlockWise1x128
    return scaled_mm(
        a.values,
        b.values.T,
        a.scales.T,
        ScalingType.BlockWise1x128,
        b.scales.T,
        scaling,
        output_dtype=dtype,
    )
