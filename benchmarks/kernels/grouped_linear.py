"""The experts' products in BF16 at the sizes of bench-6b: forward, and both gradients."""

from collections.abc import Iterator

import torch.nn.functional as F
from common_kernels import Row
from grouped_gemm import bf16, uneven
from torch import Tensor

from whalefall.ops.grouped_linear import grouped_linear, grouped_weight_gradient

TOKENS, GROUPS = 98304, 64


def rows() -> Iterator[Row]:
    ends = uneven(TOKENS, GROUPS)
    for out, inner in ((2816, 2048), (2048, 1408)):
        x, grad = bf16(TOKENS, inner), bf16(TOKENS, out)
        weight = bf16(GROUPS, out, inner)
        yield product("fprop", x, weight, ends)
        yield product("dgrad", grad, weight.mT, ends)
        yield weight_gradient(grad, x, ends)


def product(name: str, x: Tensor, weight: Tensor, ends: Tensor) -> Row:
    _, out, inner = weight.shape
    return Row(
        f"grouped_linear {name} {TOKENS} x {out} x {inner}",
        lambda: grouped_linear(x, weight, ends),
        bytes=x.nbytes + weight.nbytes + 2 * TOKENS * out,
        flops=2 * TOKENS * out * inner,
        peer=lambda: F.grouped_mm(x, weight.mT, offs=ends),
        peer_name="F.grouped_mm",
    )


def weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> Row:
    out, inner = grad.shape[1], x.shape[1]
    return Row(
        f"grouped_linear wgrad {out} x {inner} x {TOKENS}",
        lambda: grouped_weight_gradient(grad, x, ends),
        bytes=grad.nbytes + x.nbytes + 2 * GROUPS * out * inner,
        flops=2 * TOKENS * out * inner,
        peer=lambda: F.grouped_mm(grad.T, x, offs=ends),
        peer_name="F.grouped_mm",
    )
