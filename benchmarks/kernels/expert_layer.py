"""The routed experts as a whole: forward, both gradients, SwiGLU and every quantization.

TFLOPS count the products alone. The peer is the same layer in BF16.
"""

from collections.abc import Callable, Iterator

import torch
from common_kernels import Row
from grouped_gemm import bf16, even, uneven
from torch import Tensor

from whalefall.ops.fp8_experts import fp8_experts
from whalefall.ops.fp8_linear import Recipe, WeightCast
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.swiglu import swiglu


def rows() -> Iterator[Row]:
    yield layer(even(8192, 8), hidden=7168, inner=2048)
    yield layer(even(32768, 8), hidden=7168, inner=2048)
    yield layer(uneven(98304, 64), hidden=2048, inner=1408)


def layer(ends: Tensor, hidden: int, inner: int) -> Row:
    experts, pairs = len(ends), int(ends[-1])
    x = bf16(pairs, hidden).requires_grad_()
    weights = torch.rand(pairs, device="cuda").requires_grad_()
    up = (bf16(experts, 2 * inner, hidden) / hidden**0.5).requires_grad_()
    down = (bf16(experts, hidden, inner) / inner**0.5).requires_grad_()
    grad, casts = bf16(pairs, hidden), (WeightCast(), WeightCast())
    recipe = Recipe(fprop=True, dgrad=True, wgrad=True)

    def both_ways(forward: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(forward(), (x, weights, up, down), grad)

    def in_bf16() -> Tensor:
        return grouped_linear(swiglu(grouped_linear(x, up, ends), weights), down, ends)

    return Row(
        f"experts both ways {pairs} x {hidden} x {inner}, {experts} experts",
        lambda: both_ways(lambda: fp8_experts(x, weights, ends, up, down, casts, recipe)),
        flops=3 * 2 * pairs * 3 * inner * hidden,
        peer=lambda: both_ways(in_bf16),
        peer_name="BF16, F.grouped_mm",
    )
