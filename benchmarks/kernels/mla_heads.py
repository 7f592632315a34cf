"""From MLA's projections to attention, for 4 rows of 4,096 tokens and 16 heads."""

from collections.abc import Callable, Iterator

import torch
from common_kernels import Row
from torch import Tensor

from whalefall.ops.mla_heads import composed, mla_heads
from whalefall.ops.rope import inverse_frequencies, rotations

BATCH, SEQ, HEADS, NOPE, ROPE, VALUE, LATENT = 4, 4096, 16, 128, 64, 128, 512


def rows() -> Iterator[Row]:
    inputs = [
        _random(HEADS, NOPE + ROPE),
        _random(HEADS, NOPE + VALUE),
        _random(LATENT + ROPE)[..., LATENT:].detach().requires_grad_(),
    ]
    positions = torch.arange(SEQ, device="cuda").unsqueeze(0)
    rotation = rotations(positions, inverse_frequencies(ROPE, 10000.0, "cuda"))

    def own() -> tuple[Tensor, ...]:
        return mla_heads(*inputs, rotation)

    def peer() -> tuple[Tensor, ...]:
        return composed(*inputs, rotation)

    q, kv, key = (x.numel() * x.itemsize for x in inputs)
    keys_part = kv * NOPE // (NOPE + VALUE)
    yield Row(
        "mla_heads",
        own,
        bytes=3 * q + keys_part + key,  # reads q, kv's part and the key; writes q and k
        peer=peer,
        peer_name="torch",
    )
    yield Row(
        "mla_heads, gradients",
        _gradients(own, inputs),
        bytes=3 * q + 2 * kv - keys_part + key,  # reads those of q, k and v; writes all inputs'
        peer=_gradients(peer, inputs),
        peer_name="torch",
    )


def _gradients(
    function: Callable[[], tuple[Tensor, ...]], inputs: list[Tensor]
) -> Callable[[], object]:
    outputs = function()
    outer = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, outer, retain_graph=True)


def _random(*dims: int) -> Tensor:
    shape = BATCH, SEQ, *dims
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
