"""Products of FP8 operands, against the same products in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from whalefall.ops.gemm import cublas, gemm, gemm_wgrad, own, reference
from whalefall.ops.quantize import (
    Blocks,
    Tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_transposed,
)

BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 2e-3}
"""Of ||out - right|| / ||right||: 14 bits within 128 of the contraction, 8 in a BF16 output."""


def relative_error(out: Tensor, right: Tensor) -> float:
    return ((out.double() - right.double()).norm() / right.double().norm()).item()


def normal(*shape: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device)


def with_outliers(x: Tensor) -> Tensor:
    """A thousandth of the elements 10,000 times larger, and a row of zeros."""
    x = torch.where(x.abs() > 3.3, x * 1e4, x)
    x[len(x) // 2] = 0
    return x


def test_whole_numbers_come_out_exactly() -> None:
    """E4M3 holds -16 to 16, and with 448 in every tile and block all scales are 1."""
    x, weight = (normal(rows, 144).mul(4).round().clamp(-16, 16) for rows in (5, 48))
    for matrix in (x, weight):
        matrix[:, ::128] = 448
    out = gemm(quantize_tiles(x), quantize_blocks(weight), torch.float32)
    assert torch.equal(out, x @ weight.T)


def test_quantization_is_all_that_is_lost() -> None:
    x, weight = normal(40, 576), normal(96, 576)
    assert relative_error(gemm(quantize_tiles(x), quantize_blocks(weight)), x @ weight.T) < 0.05


def test_weight_gradient_of_a_linear_layer() -> None:
    """Any number of tokens: tiles along them are padded with zeros."""
    x, grad = normal(300, 64), normal(300, 32)
    out = gemm_wgrad(quantize_transposed(grad), quantize_transposed(x))
    assert out.shape == (32, 64)
    assert relative_error(out, grad.T @ x) < 0.05


@pytest.mark.parametrize("dtype", BOUNDS)
def test_no_rows_and_no_tokens(dtype: torch.dtype) -> None:
    blocks = quantize_blocks(normal(32, 64))
    assert gemm(quantize_tiles(normal(0, 64)), blocks, dtype).shape == (0, 32)
    grad, x = (quantize_transposed(normal(0, cols)) for cols in (32, 64))
    assert torch.equal(gemm_wgrad(grad, x, dtype), torch.zeros(32, 64, dtype=dtype))


@pytest.mark.parametrize(("inner", "cols", "name"), [(40, 32, "inner"), (48, 24, "cols")])
def test_rows_of_fp8_are_whole_16_bytes(inner: int, cols: int, name: str) -> None:
    operands = quantize_tiles(normal(4, inner)), quantize_blocks(normal(cols, inner))
    with pytest.raises(ValueError, match=f"{name} to be a multiple of 16"):
        gemm(*operands)


def test_sides_of_a_weight_gradient_are_multiples_of_16() -> None:
    grad, x = (quantize_transposed(normal(8, cols)) for cols in (24, 32))
    with pytest.raises(ValueError, match="rows to be a multiple of 16"):
        gemm_wgrad(grad, x)
    with pytest.raises(ValueError, match="cols to be a multiple of 16"):
        gemm_wgrad(x, grad)


SHAPES = [(1, 16, 16), (130, 48, 144), (256, 576, 2048), (516, 2048, 576), (384, 192, 1408)]
"""Rows, columns, contraction: some with rows that cuBLAS does not take."""


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols", "inner"), SHAPES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cuda_agrees(rows: int, cols: int, inner: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, inner, device="cuda"), normal(cols, inner, device="cuda")
    agrees(gemm, quantize_tiles(x), quantize_blocks(weight), dtype)
    agrees(gemm, quantize_tiles(with_outliers(x)), quantize_blocks(with_outliers(weight)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300, 4096])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cuda_weight_gradient_agrees(tokens: int, dtype: torch.dtype) -> None:
    grad, x = normal(tokens, 576, device="cuda"), normal(tokens, 208, device="cuda")
    agrees(gemm_wgrad, quantize_transposed(grad), quantize_transposed(x), dtype)
    grad, x = with_outliers(grad), with_outliers(x)
    agrees(gemm_wgrad, quantize_transposed(grad), quantize_transposed(x), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("product", [own, cublas])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cuda_products_agree(product: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, weight = normal(516, 576, device="cuda"), normal(720, 576, device="cuda")
    x, weight = with_outliers(x), with_outliers(weight)
    agrees(product, quantize_tiles(x), quantize_blocks(weight), dtype)


OWN_SHAPES = [
    (1, 16, 16),  # one tile, which is tall
    (130, 144, 4240),  # 34 steps: of one scale a step, those of 32 are loaded at once
    (129, 5008, 272),  # more pairs of blocks across than a band has
    (2050, 2112, 640),  # more tiles than multiprocessors
    (5000, 528, 640),  # several tiles a program
]
"""Rows, columns, contraction."""


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols", "inner"), OWN_SHAPES)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_own_kernel_agrees(rows: int, cols: int, inner: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, inner, device="cuda"), normal(cols, inner, device="cuda")
    x, weight = with_outliers(x), with_outliers(weight)
    agrees(own, quantize_tiles(x), quantize_blocks(weight), dtype)


@pytest.mark.gpu
def test_own_kernel_gives_the_same_bits_again() -> None:
    x, weight = normal(2064, 4096, device="cuda"), normal(2112, 4096, device="cuda")
    operands = quantize_tiles(x), quantize_blocks(weight)
    first = own(*operands, torch.bfloat16)
    for _ in range(20):  # a stage read or overwritten too early would show as bits that change
        assert torch.equal(own(*operands, torch.bfloat16), first)


@pytest.mark.gpu
def test_cuda_without_rows_or_tokens() -> None:
    blocks = quantize_blocks(normal(32, 64, device="cuda"))
    assert gemm(quantize_tiles(normal(0, 64, device="cuda")), blocks).shape == (0, 32)
    none = quantize_transposed(normal(0, 32, device="cuda"))
    assert not gemm_wgrad(none, none).any()


def agrees(product: Callable[..., Tensor], a: Tiles, b: Tiles | Blocks, dtype: torch.dtype) -> None:
    out = product(a, b, dtype)
    assert out.dtype == dtype
    right = reference(a, b, torch.float64)
    if right.any():
        assert relative_error(out, right) < BOUNDS[dtype]
    else:
        assert not out.any()
