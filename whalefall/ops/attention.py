"""Softmax attention with keys and values of unequal width, as MLA has them (192 and 128 in V3).

On CUDA the forward pass is the library's: cuDNN is the one fused backend of torch that takes
unequal widths at full speed. Its backward pass adds in an order that varies. Ours has one order; it
is the faster one for causal rows of V3's widths on Hopper, and runs for others where torch is told
to be deterministic. The CPU's fused kernel does not take unequal widths, and with the values padded
its backward is slower than plain matrix products over blocks of queries, each against no more keys
than it sees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from whalefall.ops.function import call

_CUDA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

QUERY_BLOCK = 128
"""Queries at a time on the CPU: small enough to skip most of what causality hides."""


def attention(
    q: Float[Tensor, "batch heads queries qk"],
    k: Float[Tensor, "batch heads keys qk"],
    v: Float[Tensor, "batch heads keys v"],
    *,
    scale: float,
    mask: Bool[Tensor, "batch 1 queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries v"]:
    """softmax(scale q k^T) v over the keys that ``mask`` allows; without a mask, causal.

    Causal without a mask needs as many queries as keys: query i sees keys 0 to i. Every query
    must see at least one key.
    """
    if q.is_cuda:
        if _goes_back_by_ours(q, k, v, mask):
            return call(_OrderedAttention, q, k, v, scale, mask)
        with sdpa_kernel(_CUDA_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
            )
    return call(_BlockedAttention, q, k, v, scale, mask)


def reference(
    q: Float[Tensor, "batch heads queries qk"],
    k: Float[Tensor, "batch heads keys qk"],
    v: Float[Tensor, "batch heads keys v"],
    *,
    scale: float,
    mask: Bool[Tensor, "batch 1 queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries v"]:
    """The definition, in the type of its inputs."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def _goes_back_by_ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    from whalefall.kernels import attention_backward as kernel

    if not kernel.takes(q, k, v):
        return False
    return torch.are_deterministic_algorithms_enabled() or kernel.is_fastest(q, k, v, mask)


class _OrderedAttention(torch.autograd.Function):
    """cuDNN's forward pass, which has the same bits every time, with a backward that has too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        # Finite, as torch has it too: of infinite ones cuDNN makes NaN.
        bias = None if mask is None else torch.where(mask, 0.0, -65504.0).to(q.dtype)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, is_causal=mask is None, scale=scale
        )
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import attention_backward as kernel

        q, k, v, out, lse, mask = ctx.saved_tensors
        return *kernel.backward(grad, q, k, v, out, lse, mask, ctx.scale), None, None


class _BlockedAttention(torch.autograd.Function):
    """Keeps the probabilities of each block of queries for the backward pass.

    The library multiplies many matrices at once only into a tensor that is contiguous: a block's
    products are tensors of their own, and laid or added where they belong afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
    ) -> Tensor:
        by_head, given = q.shape[:2], q.dtype
        # Scores and probabilities are FP32 at least, as in every fused kernel.
        wide = torch.promote_types(given, torch.float32)
        q, k, v = (x.flatten(0, 1).to(wide) for x in (q, k, v))
        q = q * scale  # fewer numbers than there are scores
        out = _by_token(q, by_head, v.shape[-1])
        kept = []
        for block, seen in _blocks(q.shape[1], k.shape[1], causal=mask is None):
            scores = torch.bmm(q[:, block], k[:, seen].transpose(1, 2))
            if mask is None:
                own = scores[:, :, block]  # the square on the diagonal
                own.masked_fill_(torch.ones_like(own[0], dtype=torch.bool).triu_(1), -torch.inf)
            else:
                scores.unflatten(0, by_head).masked_fill_(~mask[:, :, block], -torch.inf)
            probabilities = scores.softmax(-1)
            out[:, :, block] = torch.bmm(probabilities, v[:, seen]).unflatten(0, by_head)
            kept.append(probabilities)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.causal = scale, mask is None
        ctx.given = given
        return out.to(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        by_head = grad.shape[:2]
        grad = grad.flatten(0, 1).to(q.dtype)
        grad_q, of_k, of_v = _by_token(q, by_head, q.shape[-1]), [], []
        blocks = _blocks(q.shape[1], k.shape[1], causal=ctx.causal)
        # From the last, which sees all the keys.
        for (block, seen), probabilities in reversed(list(zip(blocks, kept, strict=True))):
            of_v.append(torch.bmm(probabilities.transpose(1, 2), grad[:, block]))
            grad_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(grad[:, block], v[:, seen].transpose(1, 2)), probabilities, -1, q.dtype
            )
            own = torch.bmm(grad_scores, k[:, seen]).unflatten(0, by_head)
            torch.mul(own, ctx.scale, out=grad_q[:, :, block])
            of_k.append(torch.bmm(grad_scores.transpose(1, 2), q[:, block]))
        grads = grad_q, *(_total(parts).unflatten(0, by_head) for parts in (of_k, of_v))
        return *(x.to(ctx.given) for x in grads), None, None


def _by_token(like: Tensor, by_head: torch.Size, width: int) -> Tensor:
    """Empty [batch, heads, queries, width] in the memory of [batch, queries, heads, width]."""
    batch, heads = by_head
    return like.new_empty(batch, like.shape[1], heads, width).transpose(1, 2)


def _total(parts: list[Tensor]) -> Tensor:
    """The sum of what blocks give to their first keys, of which the first block's are all."""
    total, *others = parts
    for part in others:
        total[:, : part.shape[1]] += part
    return total


def _blocks(queries: int, keys: int, *, causal: bool) -> list[tuple[slice, slice]]:
    """Slices of queries, each with the slice of keys that any of them sees."""
    blocks = []
    for start in range(0, max(queries, 1), QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, queries)
        blocks.append((slice(start, stop), slice(0, stop if causal else keys)))
    return blocks
