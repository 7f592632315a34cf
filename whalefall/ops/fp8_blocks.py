"""Weights in 128x128 blocks of FP8 E4M3, one FP32 scale a block (paper 3.3.2).

This is the layout of DeepSeek's published checkpoints: beside every quantized ``weight`` stands
``weight_scale_inv``, the number each of a block's values is multiplied by. Blocks at the lower and
right edge may be partial. V3.1 rounds its scales to powers of two (``scale_fmt: ue8m0``), stored
as FP32 or as the one-byte ``float8_e8m0fnu``; they are read the same way.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

BLOCK = 128
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_blocks(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out_blocks in_blocks"]]:
    """The weight in ``float8_e4m3fn`` and the FP32 scale of each block, amax / 448.

    The division is done in FP32 and rounds to nearest even, so the largest value of a block
    becomes exactly 448. A block of zeros has scale 1.
    """
    out_features, in_features = weight.shape
    padding = (0, -in_features % BLOCK, 0, -out_features % BLOCK)
    blocks = F.pad(weight.float(), padding).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    amax = blocks.abs().amax(dim=(1, 3))
    scale = amax / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    # amax / 448 may have been rounded down: an ulp above 448 must not overflow.
    scaled = (blocks / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    quantized = scaled.flatten(2, 3).flatten(0, 1)[:out_features, :in_features]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scale


def dequantize_blocks(
    weight: Float[Tensor, "out in"],
    scale_inv: Shaped[Tensor, "out_blocks in_blocks"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """FP8 value times scale in FP32, then one rounding to ``dtype``.

    The scales may be of any floating type (jaxtyping's ``Float`` does not know ``float8_e8m0fnu``).

    Raises ValueError if there is not one scale for every block of the weight.
    """
    out_features, in_features = weight.shape
    blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
    if scale_inv.shape != blocks:
        raise ValueError(
            f"a weight of {out_features} x {in_features} needs {blocks[0]} x {blocks[1]} scales "
            f"of {BLOCK} x {BLOCK} blocks, not {' x '.join(map(str, scale_inv.shape))}"
        )
    scale = scale_inv.float().repeat_interleave(BLOCK, 0)[:out_features]
    return (weight.float() * scale.repeat_interleave(BLOCK, 1)[:, :in_features]).to(dtype)
