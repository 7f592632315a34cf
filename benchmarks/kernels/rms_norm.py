"""RMSNorm on a step's 16,384 tokens: the residual stream, and both latents of attention."""

from collections.abc import Callable, Iterator

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
    inputs = [_random(TOKENS, 2048), _random(TOKENS, 2048), _random(2048)]
    yield from _both_ways("add_rms_norm 2048", 4, 4, inputs, _own_sum, _torch_sum)


def _both_ways(
    name: str,
    forward: int,
    backward: int,
    inputs: list[Tensor],
    own: Callable[..., tuple[Tensor, ...]],
    peer: Callable[..., tuple[Tensor, ...]],
) -> Iterator[Row]:
    """``forward`` and ``backward`` are the numbers that must move for one of an input."""
    nbytes = inputs[0].numel() * inputs[0].itemsize
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


def _own_sum(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(residual, delta, weight, EPS)


def _torch_sum(residual: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + delta
    return total, F.rms_norm(total, weight.shape, weight, EPS)
