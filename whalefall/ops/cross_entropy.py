"""Output head and cross-entropy in one, so that [tokens, vocab] never exists at once.

At 4,096 tokens and 129,280 words the FP32 logits alone are 2.1 GB, and autograd would keep two
more copies. Here the tokens go through the head in chunks, and the gradients of a chunk are made
while its logits are still there: three GEMMs, as plain autograd has, and memory for one chunk.
The idea is Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""Target of a position that has none."""

CHUNK_LOGITS = 2**25
"""FP32 logits alive at a time (128 MiB)."""


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
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Collected in FP32: rounding to BF16 after every chunk would add up.
        wide = torch.promote_types(head.dtype, torch.float32)
        grad_head = torch.zeros_like(head, dtype=wide) if needs_head else None
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_LOGITS // len(head))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            x, target = hidden[chunk], targets[chunk]
            counted = target != IGNORED
            column = target.where(counted, 0).unsqueeze(1)
            logits = (x @ head.T).float()
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, column).squeeze(1)
            # One exponential a logit serves the normalizer and the softmax, where the logits were.
            normalizer = logits.exp_().sum(1)
            nll[chunk] = (normalizer.log() - chosen).where(counted, 0.0)
            if not (needs_hidden or needs_head):
                continue
            # d nll / d logits = softmax - one_hot.
            weight = token_weights[chunk] * counted
            grad = logits.mul_((weight / normalizer).unsqueeze(1))
            grad.scatter_add_(1, column, -weight.to(grad.dtype).unsqueeze(1))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[chunk])
            if grad_head is not None and grad_head.dtype == x.dtype:
                grad_head.addmm_(grad.T, x)
            elif grad_head is not None:
                grad_head += grad.T @ x
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
                grad.mul_(grad_sum)
        return grad_hidden, grad_head, None, None
