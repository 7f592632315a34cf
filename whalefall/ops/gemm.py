"""Matrix products of FP8 operands: forward, input gradient and weight gradient of a linear layer.

Both operands have the contraction along their rows, in tiles or blocks of 128. Within 128 the
tensor core accumulates (about 14 bits); from 128 to 128 the sums are FP32, with the scales
(paper 3.3.2). On CUDA this is cuBLAS, which does exactly that on Hopper.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from whalefall.ops.quantize import Blocks, Tiles, dequantize

FP8_ALIGNMENT = 16
"""Both sides of a weight are multiples of it: rows of FP8 begin at multiples of 16 bytes."""


def gemm(a: Tiles, b: Blocks, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
    """a b^T, from [rows, inner] and [cols, inner]: the forward pass with b the weight's blocks,
    the gradient of the input with those of its transpose.

    cuBLAS wants a multiple of 4 rows, so that each column of their scales is aligned; any other
    number goes to our grouped kernel as one group. Raises ``ValueError`` for ``inner`` or
    ``cols`` that are no multiple of 16.
    """
    check_sizes(inner=a.values.shape[1], cols=len(b.values))
    rows = len(a.values)
    if not a.values.is_cuda or not rows:
        return reference(a, b, dtype)
    if rows % 4:
        from whalefall.kernels import grouped_gemm as kernel

        one_group = (b.values[None], b.scales[None])
        return kernel.forward((a.values, a.scales), one_group, _all_rows(a), dtype)
    return _cublas(a, b, ScalingType.BlockWise128x128, dtype)


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
    return _cublas(a, b, ScalingType.BlockWise1x128, dtype)


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


def _cublas(a: Tiles, b: Tiles | Blocks, scaling_of_b: ScalingType, dtype: torch.dtype) -> Tensor:
    return scaled_mm(
        a.values,
        b.values.T,
        a.scales.T,
        ScalingType.BlockWise1x128,
        b.scales.T,
        scaling_of_b,
        output_dtype=dtype,
    )


def _all_rows(a: Tiles) -> Int[Tensor, "one"]:
    return torch.full((1,), len(a.values), dtype=torch.int32, device=a.values.device)
