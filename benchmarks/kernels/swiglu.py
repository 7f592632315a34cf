"""SwiGLU on a layer's 98,304 expert rows, in BF16 and straight to FP8 tiles: memory-bound."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.quantize import quantize_both, quantize_tiles, quantize_transposed
from whalefall.ops.swiglu import swiglu, swiglu_backward_tiles, swiglu_tiles

ROWS, INNER, EXPERTS = 98304, 1408, 64
NUMBERS = ROWS * INNER
FP8 = 1 + 4 / 128
"""Bytes of a number in tiles: its own, and its part of a scale."""


def rows() -> Iterator[Row]:
    name = f"swiglu {ROWS} x {INNER}"
    gate_up = torch.randn(ROWS, 2 * INNER, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(ROWS, INNER, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(ROWS, device="cuda")
    inputs = (gate_up.requires_grad_(), weights.requires_grad_())
    own, eager = swiglu(*inputs), _eager(*inputs)
    yield Row(
        name,
        lambda: swiglu(*inputs),
        bytes=NUMBERS * (2 * 2 + 2),
        peer=lambda: _eager(*inputs),
        peer_name="torch",
    )
    yield Row(
        f"{name}, gradients",
        lambda: torch.autograd.grad(own, inputs, grad, retain_graph=True),
        bytes=NUMBERS * (3 * 2 + 2 * 2),
        peer=lambda: torch.autograd.grad(eager, inputs, grad, retain_graph=True),
        peer_name="torch",
    )
    cuts = torch.randperm(ROWS, device="cuda")[: EXPERTS - 1].sort().values
    ends = torch.cat([cuts, cuts.new_tensor([ROWS])]).to(torch.int32)
    fixed = (gate_up.detach(), weights.detach())
    yield Row(
        f"{name} in tiles",
        lambda: swiglu_tiles(*fixed, keep=False),
        bytes=NUMBERS * (2 * 2 + FP8),
        peer=lambda: quantize_tiles(swiglu(*fixed)),
        peer_name="in parts",
    )
    yield Row(
        f"{name} in tiles, input kept",
        lambda: swiglu_tiles(*fixed, keep=True),
        bytes=NUMBERS * (2 * 2 + 3 * FP8),
        peer=lambda: (quantize_tiles(swiglu(*fixed)), quantize_tiles(fixed[0])),
        peer_name="in parts",
    )
    _, kept = swiglu_tiles(*fixed, keep=True)
    assert kept is not None

    def parts() -> tuple[object, ...]:
        grad_gate_up, _ = torch.autograd.grad(own, inputs, grad, retain_graph=True)
        return quantize_both(grad_gate_up, ends), quantize_transposed(swiglu(*fixed), ends)

    yield Row(
        f"{name}, gradients in tiles, {EXPERTS} groups",
        lambda: swiglu_backward_tiles(grad, kept, fixed[1], ends),
        bytes=NUMBERS * (2 + 7 * FP8),
        peer=parts,
        peer_name="in parts, nothing dequantized",
    )


def _eager(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up * weights.unsqueeze(1).to(up.dtype)
