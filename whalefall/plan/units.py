"""Units, the bytes that numbers take, and what users may give for one."""

from collections.abc import Mapping
from math import inf
from typing import Literal

from whalefall.errors import UserError

GIB = 2**30
DAY = 86400

Format = Literal["fp8", "bf16", "fp32"]

WIDTH: Mapping[Format, int] = {"fp8": 1, "bf16": 2, "fp32": 4}
"""Bytes of a number."""
TILE = 128
FP8_TILES = 1 + 4 / TILE
"""Bytes of an FP8 number where 128 have an FP32 scale: activations, gradients ([A] 3.3.2)."""
FP8_BLOCKS = 1 + 4 / TILE**2
"""Where 128 x 128 have one: weights."""


def check(what: str, value: float, *, above: bool = False) -> None:
    """That a number is finite and not below 0, or above 0.

    Raises:
        UserError: it is not.
    """
    if not 0 <= value < inf or (above and value == 0):
        allowed = "be above 0" if above else "not be below 0"
        raise UserError(f"{what} is {value:g}; it must {allowed}")
