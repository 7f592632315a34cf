"""SwiGLU as a whole, of the experts from tokens to tokens and dense: forward, all gradients, what
moves tokens to their experts and back, and every quantization.

TFLOPS count the products alone. The peer is the same layer in BF16.
"""

from collections.abc import Callable, Iterator

import torch
from common_kernels import Row
from grouped_gemm import bf16, even, uneven
from torch import Tensor

from whalefall.ops.fp8_linear import Recipe, WeightCast
from whalefall.ops.fp8_mlp import fp8_experts, fp8_mlp
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.permute import permute, sort_by_expert, unpermute
from whalefall.ops.swiglu import swiglu

RECIPE = Recipe(fprop=True, dgrad=True, wgrad=True)


def rows() -> Iterator[Row]:
    # A rank of DeepSeek-V3 has 8 of its experts, mostly one that a token chose.
    yield experts(even(8192, 8), top_k=1, hidden=7168, inner=2048)
    yield experts(even(32768, 8), top_k=1, hidden=7168, inner=2048)
    yield experts(uneven(98304, 64), top_k=6, hidden=2048, inner=1408)
    yield dense(16384, hidden=2048, inner=2816)
    yield dense(16384, hidden=2048, inner=8192)


def experts(ends: Tensor, top_k: int, hidden: int, inner: int) -> Row:
    count, pairs = len(ends), int(ends[-1])
    sizes = ends.diff(prepend=ends.new_zeros(1))
    choices = torch.arange(count, device="cuda").repeat_interleave(sizes)
    choices = choices[torch.randperm(pairs, device="cuda")].view(-1, top_k)
    places, row_tokens = sort_by_expert(choices, count)
    x, grad = bf16(len(choices), hidden).requires_grad_(), bf16(len(choices), hidden)
    weights = torch.rand(pairs, device="cuda").requires_grad_()
    up, down = (bf16(count, 2 * inner, hidden), bf16(count, hidden, inner))
    up, down = (up / hidden**0.5).requires_grad_(), (down / inner**0.5).requires_grad_()
    table, casts = (places, row_tokens, weights, ends), (WeightCast(), WeightCast())

    def in_bf16() -> Tensor:
        gate_up = grouped_linear(permute(x, places, row_tokens), up, ends)
        return unpermute(grouped_linear(swiglu(gate_up, weights), down, ends), places, row_tokens)

    return Row(
        f"experts both ways {pairs} x {hidden} x {inner}, {count} experts",
        both_ways(
            lambda: fp8_experts(x, *table, up, down, casts, RECIPE), (x, weights, up, down), grad
        ),
        flops=3 * 2 * pairs * 3 * inner * hidden,
        peer=both_ways(in_bf16, (x, weights, up, down), grad),
        peer_name="BF16, by parts",
    )


def dense(tokens: int, hidden: int, inner: int) -> Row:
    x, grad = bf16(tokens, hidden).requires_grad_(), bf16(tokens, hidden)
    gate, up = ((bf16(inner, hidden) / hidden**0.5).requires_grad_() for _ in range(2))
    down, casts = (bf16(hidden, inner) / inner**0.5).requires_grad_(), (WeightCast(), WeightCast())
    return Row(
        f"SwiGLU both ways {tokens} x {hidden} x {inner}",
        both_ways(lambda: fp8_mlp(x, gate, up, down, casts, RECIPE), (x, gate, up, down), grad),
        flops=3 * 2 * tokens * 3 * inner * hidden,
        peer=both_ways(
            lambda: swiglu(x @ torch.cat([gate, up]).T) @ down.T, (x, gate, up, down), grad
        ),
        peer_name="BF16, by parts",
    )


def both_ways(
    forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), inputs, grad)
