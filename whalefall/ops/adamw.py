"""AdamW in FP32 on state that may be stored in BF16 (paper 3.3.3; arXiv 1711.05101).

BF16 is a storage format only: numbers are widened, updated in FP32 and rounded back; or split, so
that nothing is lost, where a weight has a remainder (``halves``). On CUDA one kernel does it all in
one pass; elsewhere PyTorch's fused FP32 update runs over widened chunks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whalefall.ops.function import runs_kernel
from whalefall.ops.halves import join, split
from whalefall.ops.squares import kept_squares

CHUNK = 2**26
"""Numbers that are widened at a time; four FP32 copies of them, at most, are 1 GiB."""


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gradient_divisor: Tensor,
) -> None:
    """One step in place, for contiguous tensors of one device, each in FP32 or BF16.

    A BF16 weight with a remainder (int16) stands for the FP32 number that they make when joined,
    which is what is updated. ``step`` counts from 1. Gradients are divided by ``gradient_divisor``
    (an FP32 scalar on their device), which clips them without another pass; they may be
    overwritten. A divisor that is not finite leaves all as it was. On CUDA that is decided on the
    device, and nothing here waits for it.
    """
    if not weights:
        return
    if runs_kernel(*weights, *gradients, *exp_avgs, *exp_avg_sqs):
        from whalefall.kernels import adamw as kernel

        for tensors in zip(weights, remainders, gradients, exp_avgs, exp_avg_sqs, strict=True):
            kernel.adamw_(
                *tensors,
                gradient_divisor,
                learning_rate=learning_rate,
                betas=betas,
                corrections=(1 - betas[0] ** step, 1 - betas[1] ** step),
                eps=eps,
                weight_decay=weight_decay,
            )
    elif gradient_divisor.isfinite():
        taken = torch.tensor(float(step), device=gradient_divisor.device)
        for chunk in _chunks(weights, remainders, exp_avgs, exp_avg_sqs, gradients):
            wide = [_widened(*pieces) for pieces in chunk]
            weight, exp_avg, exp_avg_sq, gradient = (list(kind) for kind in zip(*wide, strict=True))
            torch._fused_adamw_(
                weight,
                gradient,
                exp_avg,
                exp_avg_sq,
                [],
                [taken] * len(weight),
                lr=learning_rate,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=gradient_divisor,
            )
            for pieces, updated in zip(chunk, wide, strict=True):
                _narrow(pieces, updated)
    # Whoever keeps something made of the weights must see that they have changed; neither our
    # kernel nor torch's fused one tells.
    written = (*weights, *(remainder for remainder in remainders if remainder is not None))
    torch.autograd.graph.increment_version(written)


@torch.no_grad()
def reference(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The definition, for one weight, in FP32 or wider; everything is rounded after the step."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    new, gradient = weight.to(wide), gradient.to(wide)
    first = torch.lerp(gradient, exp_avg.to(wide), betas[0])
    second = torch.lerp(gradient.square(), exp_avg_sq.to(wide), betas[1])
    denominator = (second / (1 - betas[1] ** step)).sqrt() + eps
    new = new * (1 - learning_rate * weight_decay)
    weight.copy_(new - learning_rate * (first / (1 - betas[0] ** step)) / denominator)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors together: a scalar on their device, FP32 for lower precisions.

    Partial sums are added in a fixed order: the same tensors have the same norm to the last bit. A
    tensor that its maker has left these with (``squares``) is not read.
    """
    if not tensors:
        return torch.zeros(())
    return torch.cat([_squares(x) for x in tensors]).sum().sqrt()


def _squares(x: Tensor) -> Float[Tensor, "parts"]:
    """What the squares of x add up to, in parts: as left with it, or in a pass over x."""
    kept = kept_squares(x)
    if kept is not None:
        return kept
    if runs_kernel(x):
        from whalefall.kernels import adamw as kernel

        return kernel.sums_of_squares(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide).square().view(1)


def _chunks(*tensors: Sequence[Any]) -> Iterator[list[tuple[Any, ...]]]:
    """Flat pieces of corresponding tensors, gathered to about ``CHUNK`` numbers at a time."""
    chunk: list[tuple[Any, ...]] = []
    size = 0
    for group in zip(*tensors, strict=True):
        flat = [None if tensor is None else tensor.view(-1) for tensor in group]
        for start in range(0, group[0].numel(), CHUNK):
            piece = slice(start, start + CHUNK)
            chunk.append(tuple(None if x is None else x[piece] for x in flat))
            size += len(chunk[-1][0])
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _widened(weight: Tensor, remainder: Tensor | None, *others: Tensor) -> list[Tensor]:
    """The weight, moments and gradient in FP32; what is FP32 already is not copied."""
    joined = weight if remainder is None else join(weight, remainder)
    return [joined.float(), *(x.float() for x in others)]


def _narrow(pieces: tuple[Any, ...], updated: Sequence[Tensor]) -> None:
    """Fill the pieces, other than the gradient, from their FP32 forms."""
    weight, remainder, exp_avg, exp_avg_sq, _ = pieces
    new_weight, new_exp_avg, new_exp_avg_sq, _ = updated
    if remainder is not None:
        new_weight, lower = split(new_weight)
        remainder.copy_(lower)
    weight.copy_(new_weight)  # a tensor onto itself is nothing to do
    exp_avg.copy_(new_exp_avg)
    exp_avg_sq.copy_(new_exp_avg_sq)
