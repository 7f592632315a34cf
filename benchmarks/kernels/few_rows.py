"""Decoding's experts and projections at the sizes of bench-6b, tokens routed at random.

The shared expert is one of them. Bytes are the weights of the experts that have tokens, and the
rows; the peer is the library's grouped GEMM of BF16 weights, and for a projection its BF16 GEMM.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.block_linear import block_linear
from whalefall.ops.few_rows import Weight, few_rows
from whalefall.ops.fp8_blocks import encode_blocks
from whalefall.ops.permute import permute, sort_by_expert
from whalefall.ops.quantize import quantize_blocks
from whalefall.ops.swiglu import swiglu

BATCHES = (1, 8, 32, 128, 256)

# Both of queries and keys, q_b_proj, o_proj; the dense layer's two.
PROJECTIONS = "2112x2048 3072x1536 2048x2048 16384x2048 2048x8192"


def rows() -> Iterator[Row]:
    yield from experts(n_experts=64, top_k=6, hidden=2048, inner=1408)
    for shape in PROJECTIONS.split():
        out, inner = map(int, shape.split("x"))
        for tokens in BATCHES:
            yield projection(tokens, out, inner)


def experts(*, n_experts: int, top_k: int, hidden: int, inner: int) -> Iterator[Row]:
    gate_up, down = bf16(n_experts + 1, 2 * inner, hidden), bf16(n_experts + 1, hidden, inner)
    forms = {"BF16": (Weight(gate_up), Weight(down)), "FP8": (rounded(gate_up), rounded(down))}
    for tokens in BATCHES:
        x = bf16(tokens, hidden)
        choices = torch.rand(tokens, n_experts, device="cuda").topk(top_k).indices
        everywhere = torch.cat([choices, choices.new_full((tokens, 1), n_experts)], 1)
        hit = len(everywhere.unique())
        for form, weights in forms.items():
            yield Row(
                f"few_rows {form}, {tokens} tokens, {hit} experts",
                ours(x, choices, n_experts, weights),
                bytes=hit * sum(weight.values[0].nbytes for weight in weights)
                + x.nbytes
                + everywhere.numel() * 2 * (2 * inner + hidden),
                peer=peer(x, everywhere, gate_up, down),
                peer_name="permute, F.grouped_mm BF16",
            )


def ours(
    x: Tensor, choices: Tensor, n_experts: int, weights: tuple[Weight, Weight]
) -> Callable[[], Tensor]:
    row_tokens = choices.flatten().argsort(stable=True) // choices.shape[1]
    shares = torch.rand(len(row_tokens), device="cuda")
    sizes = choices.flatten().bincount(minlength=n_experts)
    inputs = (x, row_tokens, shares, sizes.cumsum(0, dtype=torch.int32))
    return lambda: few_rows(*inputs, *weights)


def peer(x: Tensor, choices: Tensor, gate_up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    table = sort_by_expert(choices, len(gate_up))
    sizes = choices.flatten().bincount(minlength=len(gate_up))
    ends = sizes.cumsum(0, dtype=torch.int32)
    shares = torch.rand(choices.numel(), device="cuda")

    def run() -> Tensor:
        joint = F.grouped_mm(permute(x, *table), gate_up.mT, offs=ends)
        return F.grouped_mm(swiglu(joint, shares), down.mT, offs=ends)

    return run


def projection(tokens: int, out: int, inner: int) -> Row:
    x, weight = bf16(tokens, inner), bf16(out, inner)
    values, scale = encode_blocks(weight)
    return Row(
        f"block_linear {tokens} x {out} x {inner}",
        lambda: block_linear(x, values, scale),
        bytes=values.nbytes + 2 * tokens * (out + inner),
        flops=2 * tokens * out * inner,
        peer=lambda: F.linear(x, weight),
        peer_name="F.linear BF16",
    )


def rounded(weight: Tensor) -> Weight:
    blocks = quantize_blocks(weight)
    return Weight(blocks.values, blocks.scales[..., : -(-weight.shape[2] // 128)].contiguous())


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
