"""E5M6, E5M2 and LogFMT: every format's numbers, error bound and edges."""

import math

import pytest
import torch
from torch import Tensor

from whalefall.ops.formats import (
    dequantize_values,
    logfmt_decode,
    logfmt_encode,
    quantize_e5m2,
    quantize_e5m6,
    round_e5m6,
)
from whalefall.ops.quantize import dequantize, quantize_tiles

E5M6_NUMBERS = sorted(
    {0.0}
    | {mantissa * 2.0**-20 for mantissa in range(64)}
    | {(64 + mantissa) * 2.0 ** (e - 21) for e in range(1, 31) for mantissa in range(64)}
)
FORMATS = {
    "e4m3": lambda x: dequantize(quantize_tiles(x)),
    "e5m2": lambda x: dequantize_values(*quantize_e5m2(x)),
    "e5m6": lambda x: dequantize_values(*quantize_e5m6(x)),
    "logfmt-8": lambda x: logfmt_decode(*logfmt_encode(x, 8), 8),
    "logfmt-10": lambda x: logfmt_decode(*logfmt_encode(x, 10), 10),
}
# Half a step relative to the value, and half the smallest step relative to the tile's largest.
FLOATING = {
    "e4m3": (2**-4, 2**-10 / 448),
    "e5m2": (2**-3, 2**-17 / 57344),
    "e5m6": (2**-7, 2**-21 / 32512),  # the scale may be rounded up by almost 2
}
EXTREMES = {
    "zeros": torch.zeros(2, 200),
    "one element": torch.tensor([[-3.7]]),
    "all equal": torch.full((2, 130), 0.37),
    "outliers": torch.randn(4, 256, generator=torch.Generator().manual_seed(3)).index_fill(
        1, torch.tensor([5, 200]), 1e4
    ),
    "subnormals": torch.full((1, 3), 1e-40) * torch.tensor([1.0, 2.0, -8.0]),
    "huge": torch.full((1, 130), 3e38),
}


def activations(rows: int = 64) -> Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))


def tile_amax(x: Tensor) -> Tensor:
    return torch.cat(
        [part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(128, 1)], 1
    )


def test_every_e5m6_number_is_kept_and_is_a_bf16_and_fp16_number() -> None:
    numbers = torch.tensor(E5M6_NUMBERS)
    assert len(numbers) == 31 * 64 and numbers[-1] == 65024
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(numbers.to(dtype).double(), numbers.double())
        for sign in (1, -1):
            assert torch.equal(round_e5m6(sign * numbers.to(dtype)), sign * numbers.to(dtype))


def test_e5m6_rounds_to_the_nearest_and_ties_to_even() -> None:
    """At the middle of every two neighbours and right beside it."""
    numbers = torch.tensor(E5M6_NUMBERS)
    middle = (numbers[:-1] + numbers[1:]) / 2
    even = numbers[(torch.arange(len(middle)) + 1) // 2 * 2]
    assert torch.equal(round_e5m6(middle), even)
    assert torch.equal(round_e5m6(middle.nextafter(torch.tensor(0.0))), numbers[:-1])
    assert torch.equal(round_e5m6(-middle.nextafter(torch.tensor(1e9))), -numbers[1:])


def test_e5m6_ties_saturation_and_nan() -> None:
    x = torch.tensor([1 + 2**-7, 1 + 3 * 2**-7, 2.0**-21, 3 * 2.0**-21, 65535, -1e30, math.inf])
    right = [1, 1 + 2**-5, 0, 2.0**-19, 65024, -65024, 65024]
    assert round_e5m6(x).tolist() == right
    assert round_e5m6(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("name", FLOATING)
@pytest.mark.parametrize("case", ["activations", *sorted(set(EXTREMES) - {"subnormals"})])
def test_floating_formats_err_by_half_a_step(name: str, case: str) -> None:
    x = activations() if case == "activations" else EXTREMES[case]
    relative, smallest = FLOATING[name]
    error = (FORMATS[name](x) - x).abs()
    bound = torch.maximum(x.abs() * relative, tile_amax(x) * smallest)
    assert (error <= bound * 1.0001).all()


def test_e5m6_scales_are_powers_of_two_and_the_product_is_bf16() -> None:
    x = activations() * 37
    values, scales = quantize_e5m6(x)
    assert values.dtype == torch.bfloat16 and scales.shape == (4, len(x))
    assert (scales.frexp().mantissa == 0.5).all()
    amax = x.abs().unflatten(1, (4, 128)).amax(2).T / scales
    assert (amax <= 65024).all() and (amax > 65024 / 2).all()
    restored = dequantize_values(values, scales)
    assert torch.equal(restored.bfloat16().float(), restored)


def test_turning_e5m6_tiles_rounds_nothing_again() -> None:
    """What the backward pass does: dequantize, transpose, quantize."""
    restored = dequantize_values(*quantize_e5m6(activations(256)))
    turned = dequantize_values(*quantize_e5m6(restored.T.contiguous()))
    normal = restored.T.abs() > 2**-10  # anything below a 2^29th of the largest may round
    assert torch.equal(turned[normal], restored.T[normal])


@pytest.mark.parametrize("bits", [3, 4, 8, 10, 16])
@pytest.mark.parametrize("case", ["activations", *EXTREMES])
def test_logfmt_takes_the_nearest_level(case: str, bits: int) -> None:
    x = activations(8) if case == "activations" else EXTREMES[case]
    codes, low, step = logfmt_encode(x, bits)
    assert codes.shape == x.shape
    assert 0 <= codes.min().item() <= codes.max().item() < 2**bits
    assert codes.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    restored = logfmt_decode(codes, low, step, bits)
    assert restored.isfinite().all()
    assert (restored[restored != 0].sign() == x[restored != 0].sign()).all()
    per_value = step.repeat_interleave(128, 1)[:, : x.shape[1]]
    smallest = low.exp().repeat_interleave(128, 1)[:, : x.shape[1]]
    # Between levels e^step apart, the middle is off by tanh(step / 2) of itself.
    bound = torch.maximum(x.abs() * (per_value / 2).tanh(), smallest / 2 * (x.abs() < smallest))
    assert ((restored - x).abs() <= bound + x.abs() * 2e-5 + 1e-44).all()


def test_logfmt_keeps_zero_and_the_smallest_and_largest_of_a_tile() -> None:
    x = torch.tensor([[0.0, 0.5, -2.0, 8.0]])
    codes, low, step = logfmt_encode(x, 8)
    assert codes.tolist() == [[0, 1, 128 + 64, 127]]  # 2 is half way from 1/2 to 8
    torch.testing.assert_close(low.exp(), torch.tensor([[0.5]]))
    torch.testing.assert_close(step * 126, torch.tensor([[math.log(16)]]))
    torch.testing.assert_close(logfmt_decode(codes, low, step, 8), x)


def test_logfmt_range_is_two_to_the_32() -> None:
    x = torch.tensor([[1.0, 2.0**-31, 2.0**-33 * 1.1, 2.0**-33 * 0.9, 1e-30]])
    codes, low, _ = logfmt_encode(x, 8)
    assert low.item() == pytest.approx(-32 * math.log(2))
    assert codes[0, 2:].tolist() == [1, 0, 0]


def test_logfmt_rounds_in_linear_space() -> None:
    """Levels 1 and 4, and 2.3: nearer to 1 by size, to 4 by its logarithm. So is the mean kept."""
    x = torch.tensor([[1.0, 4.0, 16.0, 2.3]])
    assert logfmt_encode(x, 3)[0].tolist() == [[1, 2, 3, 1]]
    x = 1 + 15 * torch.rand(100, 128, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1] = 1, 16
    restored = logfmt_decode(*logfmt_encode(x, 4), 4)
    assert restored.mean() == pytest.approx(x.mean().item(), rel=5e-3)


def test_logfmt_is_closer_than_floating_formats_of_its_width() -> None:
    """arXiv 2505.09343, 4.3: 8 bits beat E4M3 and E5M2, 10 bits come near BF16."""
    x = activations()
    mean = {name: ((to(x) - x).abs() / x.abs()).mean().item() for name, to in FORMATS.items()}
    assert mean["logfmt-10"] < mean["logfmt-8"] < mean["e4m3"] < mean["e5m2"]
    assert mean["logfmt-8"] < 0.7 * mean["e4m3"]
    bfloat16 = ((x.bfloat16().float() - x).abs() / x.abs()).mean()
    assert mean["logfmt-10"] < 3 * bfloat16


def test_logfmt_names_a_wrong_width() -> None:
    with pytest.raises(ValueError, match="3 to 16 bits, not 2"):
        logfmt_encode(torch.ones(1, 1), 2)
