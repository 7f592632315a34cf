"""Products of FP8 operands by groups, against each group's own product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.gemm import gemm, gemm_wgrad
from whalefall.ops.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_wgrad,
    reference,
    reference_wgrad,
)
from whalefall.ops.quantize import (
    Blocks,
    Tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_transposed,
)

SIZES = [
    [200, 1, 130],
    [0, 140, 0, 20, 0],  # empty groups at both ends and between
    [0, 128, 0],  # all rows in one group
    [0, 0, 0],  # no rows at all
]
NOBODYS = 3
"""Rows after the last group's."""


def normal(*shape: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=device)


def ends_of(sizes: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 140), min_size=1, max_size=5))
def test_every_group_meets_its_own_weight(sizes: list[int]) -> None:
    x, weight = normal(sum(sizes) + NOBODYS, 32), normal(len(sizes), 48, 32)
    out = grouped_gemm(quantize_tiles(x), quantize_blocks(weight), ends_of(sizes))
    assert out.shape == (sum(sizes) + NOBODYS, 48)
    for rows, matrix, own in zip(
        x[:-NOBODYS].split(sizes), weight, out[:-NOBODYS].split(sizes), strict=True
    ):
        assert torch.equal(own, gemm(quantize_tiles(rows), quantize_blocks(matrix)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 140), min_size=1, max_size=5))
def test_weight_gradients_are_sums_over_their_own_rows(sizes: list[int]) -> None:
    grad, x = normal(sum(sizes) + NOBODYS, 48), normal(sum(sizes) + NOBODYS, 32)
    ends = ends_of(sizes)
    out = grouped_gemm_wgrad(quantize_transposed(grad, ends), quantize_transposed(x, ends), ends)
    assert out.shape == (len(sizes), 48, 32)
    for size, own, rows, inputs in zip(
        sizes, out, grad[:-NOBODYS].split(sizes), x[:-NOBODYS].split(sizes), strict=True
    ):
        assert torch.equal(own, gemm_wgrad(quantize_transposed(rows), quantize_transposed(inputs)))
        assert size or not own.any()


@pytest.mark.parametrize(("inner", "cols", "name"), [(40, 32, "inner"), (48, 24, "cols")])
def test_rows_of_fp8_are_whole_16_bytes(inner: int, cols: int, name: str) -> None:
    a, b = quantize_tiles(normal(4, inner)), quantize_blocks(normal(2, cols, inner))
    with pytest.raises(ValueError, match=f"{name} to be a multiple of 16"):
        grouped_gemm(a, b, ends_of([1, 3]))


def test_sides_of_a_weight_gradient_are_multiples_of_16() -> None:
    ends = ends_of([5, 3])
    grad, x = (quantize_transposed(normal(8, cols), ends) for cols in (24, 32))
    with pytest.raises(ValueError, match="rows to be a multiple of 16"):
        grouped_gemm_wgrad(grad, x, ends)


CUDA_SIZES = [*SIZES, [7] * 40, [1000, 3, 0, 300, 257], [129, 127, 384, 640]]
BOUNDS = {torch.bfloat16: 3e-3, torch.float32: 2e-3}
"""Of ||out - right|| / ||right||: 14 bits within 128 of the contraction, 8 in a BF16 output."""


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CUDA_SIZES, ids=str)
@pytest.mark.parametrize(
    ("cols", "inner"), [(256, 128), (208, 576), (576, 1408), (16, 16), (384, 4240)]
)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cuda_agrees(sizes: list[int], cols: int, inner: int, dtype: torch.dtype) -> None:
    a, b = operands(sizes, cols, inner)
    ends = ends_of(sizes, "cuda")
    rows = sum(sizes)
    agrees(grouped_gemm(a, b, ends, dtype)[:rows], reference(a, b, ends, torch.float64)[:rows])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CUDA_SIZES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(576, 208), (16, 1408), (576, 2816), (2048, 144)])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cuda_weight_gradient_agrees(
    sizes: list[int], rows: int, cols: int, dtype: torch.dtype
) -> None:
    ends = ends_of(sizes, "cuda")
    tokens = sum(sizes) + NOBODYS
    grad, x = (with_outliers(normal(tokens, side, device="cuda")) for side in (rows, cols))
    a, b = quantize_transposed(grad, ends), quantize_transposed(x, ends)
    agrees(grouped_gemm_wgrad(a, b, ends, dtype), reference_wgrad(a, b, ends, torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [20_000, 20_002])
def test_cuda_agrees_over_many_tiles_of_a_program(tokens: int) -> None:
    """Stages and the blocks in shared memory are used again; scales are padded, or not."""
    sizes = [tokens - 9_300, 5_001, 1, 0, 4_298]
    test_cuda_agrees(sizes, 1408, 272, torch.bfloat16)
    test_cuda_weight_gradient_agrees(sizes, 2816, 1408, torch.bfloat16)


@pytest.mark.gpu
def test_cuda_gives_the_same_bits_again() -> None:
    sizes = [1000, 3, 0, 300, 257]
    ends = ends_of(sizes, "cuda")
    a, b = operands(sizes, 576, 1408)
    c, d = (quantize_transposed(normal(sum(sizes), n, device="cuda"), ends) for n in (1408, 2816))
    first = grouped_gemm(a, b, ends)[: sum(sizes)], grouped_gemm_wgrad(c, d, ends)
    for _ in range(20):  # a stage read or overwritten too early would show as bits that change
        assert torch.equal(grouped_gemm(a, b, ends)[: sum(sizes)], first[0])
        assert torch.equal(grouped_gemm_wgrad(c, d, ends), first[1])


def operands(sizes: list[int], cols: int, inner: int) -> tuple[Tiles, Blocks]:
    x = normal(sum(sizes) + NOBODYS, inner, device="cuda")
    weight = normal(len(sizes), cols, inner, device="cuda")
    return quantize_tiles(with_outliers(x)), quantize_blocks(with_outliers(weight))


def with_outliers(x: Tensor) -> Tensor:
    """A thousandth of the elements 10,000 times larger."""
    return torch.where(x.abs() > 3.3, x * 1e4, x)


def agrees(out: Tensor, right: Tensor) -> None:
    """As a whole, and zeros exactly."""
    error, size = (out.double() - right).norm(), right.norm()
    assert error <= BOUNDS[out.dtype] * size, f"{error / size:.2e}"
