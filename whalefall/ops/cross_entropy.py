"""Output head and cross-entropy in one, so that [tokens, vocab] never exists at once.

At 4,096 tokens and 129,280 words the FP32 logits alone are 2.1 GB, and autograd would keep two
more copies. Here the tokens go through the head in chunks, and the gradients of a chunk are made
while its logits are still there: three GEMMs, as plain autograd has, and memory for one chunk.
The idea is Liger Kernel's fused linear cross-entropy (arXiv 2410.10989). On CUDA the logits become
their gradient in place, in one kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import runs_kernel
from whalefall.ops.onednn import product

IGNORED = -100
"""Target of a position that has none."""

CHUNK_ROWS = 256
"""Rows of logits alive at a time on a CPU: enough for a GEMM, and of a small vocabulary few enough
for the cache. Of V3's they take 126 MiB."""

CHUNK_LOGITS_CUDA = 2**28
"""Logits alive at a time on CUDA (512 MiB in BF16): each chunk reads and writes the sum of the
head's gradient, so a GPU, which has the memory, takes few."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "tokens"],
    token_weights: Float[Tensor, "tokens"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens"]]:
    """The weighted sum of each token's -log softmax(head @ hidden)[target], and the parts.

    Returns the FP32 sum over tokens of ``token_weights`` times the negative log-likelihood, which
    carries the gradient to ``hidden`` and ``head``, and each token's own NLL in nats, unweighted
    and without gradient. Positions whose target is ``IGNORED`` count as zero in both.
    """
    return _LinearCrossEntropy.apply(hidden, head, targets, token_weights)


def reference(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "tokens"],
    token_weights: Float[Tensor, "tokens"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens"]]:
    """The definition, with all logits at once, in the type of its inputs."""
    nll = F.cross_entropy(hidden @ head.T, targets, reduction="none", ignore_index=IGNORED)
    return (nll * token_weights).sum(), nll.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, token_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        on_cuda = runs_kernel(hidden, head)
        rows = max(1, CHUNK_LOGITS_CUDA // len(head)) if on_cuda else CHUNK_ROWS
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = None
        if needs_head:
            # Chunks are collected in FP32: rounding to BF16 after every one would add up.
            wide = torch.promote_types(head.dtype, torch.float32)
            grad_head = torch.zeros_like(head, dtype=wide if len(hidden) > rows else head.dtype)
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            x = hidden[chunk]
            grad = _nll_and_gradient(
                product(x, head),
                targets[chunk],
                token_weights[chunk],
                nll[chunk],
                with_gradient=needs_hidden or needs_head,
            )
            if grad_hidden is not None:
                grad_hidden[chunk] = product(grad, head.T)
            if grad_head is not None:
                _add_product_(grad_head, grad.T, x)
        ctx.grads = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(nll)
        return (nll * token_weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once")
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        # In place: a second [vocab, hidden] would be the largest tensor of the step.
        for grad in (grad_hidden, grad_head):
            if grad is not None:
                _scale_(grad, grad_sum)
        return grad_hidden, grad_head, None, None


def _nll_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor, nll: Tensor, *, with_gradient: bool
) -> Tensor:
    """Fill ``nll``; the logits, where they were if possible, become their own gradient."""
    if runs_kernel(logits):
        from whalefall.kernels import cross_entropy as kernel

        kernel.nll_and_gradient_(
            logits, target, weight, nll, ignored=IGNORED, with_gradient=with_gradient
        )
        return logits
    counted = target != IGNORED
    column = target.where(counted, 0).unsqueeze(1)
    wide = logits.float()
    wide -= wide.amax(1, keepdim=True)
    chosen = wide.gather(1, column).squeeze(1)
    # One exponential a logit serves the normalizer and the softmax, where the logits were.
    normalizer = wide.exp_().sum(1)
    nll.copy_((normalizer.log() - chosen).where(counted, 0.0))
    if not with_gradient:
        return logits
    # d nll / d logits = softmax - one_hot.
    weight = weight * counted
    grad = wide.mul_((weight / normalizer).unsqueeze(1))
    grad.scatter_add_(1, column, -weight.to(grad.dtype).unsqueeze(1))
    return grad.to(logits.dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without rounding the product to a narrower type than total's."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor``. The factor of a loss is nearly always 1; on CUDA that moves nothing."""
    if runs_kernel(x):
        from whalefall.kernels import cross_entropy as kernel

        kernel.scale_(x, factor)
    else:
        x.mul_(factor)
