"""AdamW in FP32 on moments that may be stored in BF16 (paper 3.3.3; arXiv 1711.05101).

BF16 halves the largest state of training. It is a storage format only: a chunk of moments is
widened, updated by PyTorch's fused FP32 kernel, and rounded back.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 2**26
"""Numbers whose BF16 moments are widened at a time (two FP32 copies: 512 MiB)."""


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
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
    """One step in place, for FP32 weights and gradients of one device and any moment type.

    ``step`` counts from 1. Gradients are divided by ``gradient_divisor`` (an FP32 scalar on their
    device) inside the kernel, which clips them without another pass; they may be overwritten.
    """
    taken = torch.tensor(float(step), device=gradient_divisor.device)
    for chunk in _chunks(weights, gradients, exp_avgs, exp_avg_sqs):
        weight, gradient, *moments = (list(pieces) for pieces in zip(*chunk, strict=True))
        first, second = ([piece.float() for piece in pieces] for pieces in moments)
        torch._fused_adamw_(
            weight,
            gradient,
            first,
            second,
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
        for stored, updated in zip(moments, (first, second), strict=True):
            if stored[0] is not updated[0]:
                torch._foreach_copy_(stored, updated)


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
    """The definition, for one weight; the moments are rounded to their type after the step."""
    first = torch.lerp(gradient, exp_avg.float(), betas[0])
    second = torch.lerp(gradient.square(), exp_avg_sq.float(), betas[1])
    denominator = (second / (1 - betas[1] ** step)).sqrt() + eps
    weight.mul_(1 - learning_rate * weight_decay)
    weight.sub_(learning_rate * (first / (1 - betas[0] ** step)) / denominator)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)


def _chunks(*tensors: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Flat pieces of corresponding tensors, gathered to about ``CHUNK`` numbers at a time."""
    chunk: list[tuple[Tensor, ...]] = []
    size = 0
    for group in zip(*tensors, strict=True):
        for pieces in zip(*(tensor.view(-1).split(CHUNK) for tensor in group), strict=True):
            chunk.append(pieces)
            size += pieces[0].numel()
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk
