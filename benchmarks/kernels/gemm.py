"""Dense FP8 GEMMs beside BF16: the linear layers of bench-6b and of DeepSeek-V3."""

from collections.abc import Iterator

import torch
from common_kernels import Row
from torch import Tensor

from whalefall.ops.gemm import gemm, gemm_wgrad
from whalefall.ops.grouped_gemm import grouped_gemm_wgrad
from whalefall.ops.quantize import Tiles, quantize_blocks, quantize_tiles, quantize_transposed

SHAPES = {
    16384: "1536x2048 3072x1536 576x2048 4096x512 2048x2048 2816x2048 2048x1408",
    4096: "2112x7168 24576x1536 32768x512 7168x16384 4096x7168 7168x2048",
}
"""Out x in of the weights, by tokens: bench-6b, then DeepSeek-V3."""


def rows() -> Iterator[Row]:
    for tokens, shapes in SHAPES.items():
        for shape in shapes.split():
            out, inner = map(int, shape.split("x"))
            yield forward(tokens, out, inner)
            yield from weight_gradient(tokens, out, inner)


def forward(tokens: int, out: int, inner: int) -> Row:
    x, weight = bf16(tokens, inner), bf16(out, inner)
    a, b = quantize_tiles(x), quantize_blocks(weight)
    return Row(
        f"gemm {tokens} x {out} x {inner}",
        lambda: gemm(a, b),
        flops=2 * tokens * out * inner,
        peer=lambda: x @ weight.T,
        peer_name="BF16",
    )


def weight_gradient(tokens: int, out: int, inner: int) -> Iterator[Row]:
    """By cuBLAS, and by our grouped kernel with the tokens split into groups."""
    grad, x = bf16(tokens, out), bf16(tokens, inner)
    a, b = quantize_transposed(grad), quantize_transposed(x)
    yield Row(
        f"gemm_wgrad {out} x {inner} x {tokens}",
        lambda: gemm_wgrad(a, b),
        flops=2 * tokens * out * inner,
        peer=lambda: grad.T @ x,
        peer_name="BF16",
    )
    splits = fewest_splits(out, inner)
    yield Row(
        f"gemm_wgrad {out} x {inner} x {tokens}, {splits} splits",
        lambda: in_splits(a, b, splits),
        flops=2 * tokens * out * inner,
        peer=lambda: gemm_wgrad(a, b),
        peer_name="cuBLAS",
    )


def in_splits(a: Tiles, b: Tiles, splits: int) -> Tensor:
    """Each group sums a part of the tokens; the parts are added in order."""
    tokens = a.values.shape[1]
    ends = torch.arange(1, splits + 1, device="cuda", dtype=torch.int32)
    ends = (ends * (tokens // 128) // splits) * 128
    parts = grouped_gemm_wgrad(a, b, ends, torch.float32 if splits > 1 else torch.bfloat16)
    return parts.sum(0).bfloat16() if splits > 1 else parts[0]


def fewest_splits(out: int, inner: int) -> int:
    """That leave a tenth or less of the last wave of programs, 64 x 128 and three an SM, idle."""
    programs = 3 * torch.cuda.get_device_properties("cuda").multi_processor_count
    tiles = -(-out // 64) * -(-inner // 128)
    return next(n for n in range(1, 100) if n * tiles >= 0.9 * programs * -(-n * tiles // programs))


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
