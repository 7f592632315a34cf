"""128x128 block quantization: the published layout, its error bound, its edges."""

import pytest
import torch

from whalefall.ops.fp8_blocks import decode_blocks, encode_blocks

SHAPES = [(128, 128), (256, 384), (576, 200), (1, 1), (129, 127), (5, 300)]


def by_hand(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantization block by block, as the published layout defines it."""
    result = torch.empty(quantized.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            result[block] = quantized[block].float() * scale[i, j].float()
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_layout_and_exact_dequantization(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized, scale = encode_blocks(weight)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == weight.shape
    assert scale.dtype == torch.float32
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    assert torch.equal(decode_blocks(quantized, scale), by_hand(quantized, scale))
    assert torch.equal(
        decode_blocks(quantized, scale, torch.bfloat16),
        by_hand(quantized, scale).to(torch.bfloat16),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    quantized, scale = encode_blocks(weight)
    error = (decode_blocks(quantized, scale) - weight).abs()
    # 3 mantissa bits: half a step is 2^-4 relative; below 2^-6 the grid is 2^-9 wide.
    unit = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert (error <= torch.maximum(weight.abs() * 2**-4, unit * 2**-10) * 1.0001).all()


def test_scale_is_the_block_maximum_over_448_and_blocks_are_independent() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    weight[:128, 128:] *= 1e6
    quantized, scale = encode_blocks(weight)
    for i in range(2):
        for j in range(2):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            assert scale[i, j] == weight[block].abs().max() / 448
            assert quantized[block].float().abs().max() == 448


def test_zero_blocks_stay_zero_without_nan() -> None:
    weight = torch.zeros(200, 200)
    weight[0, 0] = 3.0
    quantized, scale = encode_blocks(weight)
    assert torch.isfinite(scale).all()
    assert torch.equal(decode_blocks(quantized, scale), weight)


def test_tiny_and_huge_values_stay_finite() -> None:
    for magnitude in (1e-38, 3e38):
        weight = torch.full((130, 130), magnitude)
        restored = decode_blocks(*encode_blocks(weight))
        torch.testing.assert_close(restored, weight, rtol=2**-4, atol=0)


def test_power_of_two_scales_are_read_in_either_storage() -> None:
    quantized, _ = encode_blocks(torch.randn(130, 260))
    exponents = torch.tensor([[-7, 0, 3], [1, -12, 5]])
    as_float = torch.pow(2.0, exponents)
    as_byte = as_float.to(torch.float8_e8m0fnu)
    expected = by_hand(quantized, as_float)
    assert torch.equal(decode_blocks(quantized, as_float), expected)
    assert torch.equal(decode_blocks(quantized, as_byte), expected)


def test_a_wrong_number_of_scales_is_named() -> None:
    quantized, scale = encode_blocks(torch.randn(130, 260))
    with pytest.raises(ValueError, match="2 x 3 scales"):
        decode_blocks(quantized, scale.T)
