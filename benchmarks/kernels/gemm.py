"""Dense FP8 GEMMs by our kernel and by cuBLAS: the linear layers of bench-6b and of DeepSeek-V3."""

from collections.abc import Iterator

import torch
from common_kernels import Row
from torch import Tensor

from whalefall.ops.gemm import cublas, gemm_wgrad, own, own_is_faster
from whalefall.ops.quantize import (
    Blocks,
    Tiles,
    quantize_blocks_both,
    quantize_tiles,
    quantize_transposed,
)

SHAPES = {
    16384: "2112x2048 3072x1536 4096x512 2048x2048 2816x2048 2048x1408",
    4096: "2112x7168 24576x1536 32768x512 7168x16384 4096x7168 7168x2048",
    1024: "2112x2048 2816x2048 7168x2048",
}
"""Out x in of the weights, by tokens: bench-6b, DeepSeek-V3, and few tokens."""


def rows() -> Iterator[Row]:
    for tokens, shapes in SHAPES.items():
        for shape in shapes.split():
            out, inner = map(int, shape.split("x"))
            x_16, grad_16 = bf16(tokens, inner), bf16(tokens, out)
            x, grad = quantize_tiles(x_16), quantize_tiles(grad_16)
            weight, transposed = quantize_blocks_both(bf16(out, inner))
            yield product(f"fprop {tokens} x {out} x {inner}", x, weight)
            yield product(f"dgrad {tokens} x {inner} x {out}", grad, transposed)
            a, b = quantize_transposed(grad_16), quantize_transposed(x_16)
            yield Row(
                f"wgrad {out} x {inner} x {tokens}",
                lambda a=a, b=b: gemm_wgrad(a, b),
                flops=2 * out * inner * tokens,
                peer=lambda a=grad_16, b=x_16: a.T @ b,
                peer_name="BF16",
            )


def product(name: str, a: Tiles, b: Blocks) -> Row:
    """What ``gemm`` chooses, beside what it does not."""
    (rows, inner), cols = a.values.shape, len(b.values)
    chosen, other = (own, cublas) if own_is_faster(rows, cols, inner) else (cublas, own)
    return Row(
        f"{name}, {chosen.__name__}",
        lambda: chosen(a, b, torch.bfloat16),
        flops=2 * rows * cols * inner,
        peer=lambda: other(a, b, torch.bfloat16),
        peer_name=other.__name__,
    )


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
