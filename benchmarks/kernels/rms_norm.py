"""RMSNorm on a step's 16,384 tokens: the residual stream, and both latents of attention.

The stream's norms add what is new in it first, and are read by several.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.rms_norm import add_rms_norm, rms_norm

TOKENS, EPS = 16384, 1e-6


def rows() -> Iterator[Row]:
    for dim, width in ((2048, 2048), (1536, 1536), (512, 576)):
        inputs = [_random(TOKENS, width)[:, :dim].detach().requires_grad_(), _random(dim)]
        name = f"rms_norm {dim}" + (f" of {width}" if width > dim else "")
        yield from _both_ways(name, 2, 3, inputs, _own, _torch)
    for deltas, uses, where in ((1, 1, ""), (2, 2, " before attention"), (1, 3, " before experts")):
        inputs = [_random(2048), *(_random(TOKENS, 2048) for _ in range(1 + deltas))]
        own, peer = partial(_own_sum, uses), partial(_torch_sum, uses)
        yield from _both_ways(f"add_rms_norm 2048{where}", 3 + deltas, 3 + uses, inputs, own, peer)


def _both_ways(
    name: str,
    forward: int,
    backward: int,
    inputs: list[Tensor],
    own: Callable[..., tuple[Tensor, ...]],
    peer: Callable[..., tuple[Tensor, ...]],
) -> Iterator[Row]:
    """``forward`` and ``backward`` are the numbers that must move for one of an input."""
    nbytes = max(tensor.numel() * tensor.itemsize for tensor in inputs)
    yield Row(
        name,
        lambda: own(*inputs),
        bytes=forward * nbytes,
        peer=lambda: peer(*inputs),
        peer_name="torch",
    )
    yield Row(
        f"{name}, gradients",
        _gradients(own, inputs),
        bytes=backward * nbytes,
        peer=_gradients(peer, inputs),
        peer_name="torch",
    )


def _gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> Callable[[], object]:
    outputs = function(*inputs)
    outer = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, outer, retain_graph=True)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def _own(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (rms_norm(x, weight, EPS),)


def _torch(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (F.rms_norm(x, weight.shape, weight, EPS),)


def _own_sum(uses: int, weight: Tensor, residual: Tensor, *deltas: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm(residual, deltas, weight, EPS, uses)


def _torch_sum(uses: int, weight: Tensor, residual: Tensor, *deltas: Tensor) -> tuple[Tensor, ...]:
    total = sum(deltas, start=residual)
    normed = F.rms_norm(total, weight.shape, weight, EPS)
    return total, *(normed.view_as(normed) for _ in range(uses))  # whose gradients autograd adds
