"""FP32 in two halves of 16 bits: nothing is lost, and the upper is the nearest BF16 number."""

import pytest
import torch
from torch import Tensor

from whalefall.ops.halves import join, split

LOWER = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]


@pytest.fixture(scope="module")
def patterns() -> Tensor:
    """All upper halves [65536] with six lower ones: every exponent, both signs, zeros, subnormals,
    infinities, NaN."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    return (upper[:, None] | torch.tensor(LOWER, dtype=torch.int32)).view(torch.float32)


def test_joined_is_what_was_split(patterns: Tensor) -> None:
    rounded, remainder = split(patterns)
    assert (rounded.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    joined, nan = join(rounded, remainder), patterns.isnan()
    bits = joined.view(torch.int32)
    assert torch.equal(bits[~nan], patterns.view(torch.int32)[~nan])
    assert torch.equal(joined.isnan(), nan) and torch.equal(rounded.isnan(), nan)


def test_the_upper_half_is_rounded_to_nearest_and_ties_away_from_zero(patterns: Tensor) -> None:
    rounded, _ = split(patterns)
    is_tie = torch.tensor([lower == 0x8000 for lower in LOWER])
    torch.testing.assert_close(
        rounded[:, ~is_tie], patterns[:, ~is_tie].bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    finite = patterns[:, 3].isfinite()
    assert (rounded[finite, 3].float().abs() > patterns[finite, 3].abs()).all()
    even = rounded[finite, 3] == patterns[finite, 3].bfloat16()
    assert even.float().mean() == 0.5  # half of the ties are even anyway


def test_a_bf16_number_leaves_nothing(patterns: Tensor) -> None:
    exact = patterns[:, 0].bfloat16()
    rounded, remainder = split(exact.float())
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0, equal_nan=True)
    assert not remainder.any()


def test_any_shape() -> None:
    for shape in [(), (0,), (3, 0, 2), (2, 3, 4)]:
        wide = torch.randn(shape)
        assert torch.equal(join(*split(wide)), wide)
