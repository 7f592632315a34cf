"""An FP32 number as a BF16 one and the 16 bits that it lacks: exact, in four bytes.

The BF16 number is the FP32 one rounded to nearest. On the bit patterns that is adding half of the
last place that is kept, and dropping what is below it; a carry goes on into the exponent as it
should, and the sign is out of its way. What was dropped, as a signed difference of patterns, is the
remainder. A tie goes away from zero: to even, it would now and then leave 32768, which 16 bits do
not hold.
"""

import torch
from torch import Tensor

NAN = 0x7FC00000
"""Stands for every NaN: rounding the pattern of another could make a number of it."""


@torch.no_grad()
def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 numbers and int16 remainders of FP32 ones, all of one shape."""
    bits = wide.view(torch.int32).masked_fill(wide.isnan(), NAN)
    upper = (bits + 0x8000) >> 16
    remainder = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


@torch.no_grad()
def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 numbers that were split, in new memory."""
    bits = rounded.view(torch.int16).int()
    return bits.bitwise_left_shift_(16).add_(remainder).view(torch.float32)
