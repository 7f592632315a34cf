"""Grouped FP8 GEMMs beside BF16: experts of bench-6b, and DeepSeek-V3's with 8 on a device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from whalefall.ops.quantize import quantize_blocks, quantize_tiles, quantize_transposed


def rows() -> Iterator[Row]:
    experts = "2816x2048 2048x1408 2048x2816 1408x2048"
    for ends, shapes, groups in (
        (uneven(98304, 64), experts, "64 groups"),
        (skewed(98304, 64), experts, "64 skewed groups"),
        (even(8192, 8), "4096x7168 7168x2048", "8 groups"),
    ):
        for out, inner in (map(int, shape.split("x")) for shape in shapes.split()):
            yield forward(ends, out, inner, groups)
    for ends, shapes, groups in (
        (uneven(98304, 64), "2816x2048 2048x1408", "64 groups"),
        (skewed(98304, 64), "2816x2048 2048x1408", "64 skewed groups"),
        (even(8192, 8), "4096x7168 7168x2048", "8 groups"),
    ):
        for out, inner in (map(int, shape.split("x")) for shape in shapes.split()):
            yield weight_gradient(ends, out, inner, groups)


def forward(ends: Tensor, out: int, inner: int, groups: str) -> Row:
    """The forward pass, and with the sides of the weight exchanged the gradient of the input."""
    tokens = int(ends[-1])
    x, weight = bf16(tokens, inner), bf16(len(ends), out, inner)
    a, b = quantize_tiles(x), quantize_blocks(weight)
    return Row(
        f"grouped_gemm {tokens} x {out} x {inner}, {groups}",
        lambda: grouped_gemm(a, b, ends),
        bytes=a.values.nbytes + b.values.nbytes + 2 * tokens * out,
        flops=2 * tokens * out * inner,
        peer=lambda: F.grouped_mm(x, weight.mT, offs=ends),
        peer_name="F.grouped_mm BF16",
    )


def weight_gradient(ends: Tensor, out: int, inner: int, groups: str) -> Row:
    tokens = int(ends[-1])
    grad, x = bf16(tokens, out), bf16(tokens, inner)
    a, b = quantize_transposed(grad, ends), quantize_transposed(x, ends)
    return Row(
        f"grouped_gemm_wgrad {out} x {inner} x {tokens}, {groups}",
        lambda: grouped_gemm_wgrad(a, b, ends),
        bytes=tokens * (out + inner) + 2 * len(ends) * out * inner,
        flops=2 * tokens * out * inner,
        peer=lambda: F.grouped_mm(grad.T, x, offs=ends),
        peer_name="F.grouped_mm BF16",
    )


def uneven(tokens: int, groups: int) -> Tensor:
    """Sizes that differ by a factor of 3, as a router leaves them that balances a batch roughly."""
    generator = torch.Generator().manual_seed(0)
    shares = (torch.rand(groups, generator=generator) + 0.5).cumsum(0)
    return (shares / shares[-1] * tokens).round().to("cuda", torch.int32)


def skewed(tokens: int, groups: int) -> Tensor:
    """Sizes from about 600 to 2,600 of 98,304 tokens for 64 groups, more of them small."""
    generator = torch.Generator().manual_seed(1)
    shares = (600 + 2000 * torch.rand(groups, generator=generator) ** 1.14).cumsum(0)
    return (shares / shares[-1] * tokens).round().to("cuda", torch.int32)


def even(tokens: int, groups: int) -> Tensor:
    return torch.arange(1, groups + 1, device="cuda", dtype=torch.int32) * (tokens // groups)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
