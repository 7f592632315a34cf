"""Which experts a token goes to, and with which shares (paper 2.1.2, equations 13 to 16).

For FP32 on CUDA one kernel makes scores, choice, weights and loads in one pass over the logits,
and another their gradient; elsewhere plain PyTorch does. Where scores tie the kernel takes the
lower index, and ``torch.topk`` any.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Routed = tuple[
    Int[Tensor, "tokens top_k"],
    Float[Tensor, "tokens top_k"],
    Float[Tensor, "tokens experts"],
    Int[Tensor, "experts"],
]


def route(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, "experts"],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
) -> Routed:
    """Experts in any order, their weights, all scores, and loads: the tokens of each expert.

    Scores are sigmoids of the logits. A token goes to the ``top_k`` best of score + bias within
    its ``topk_group`` best groups; its weights are the chosen scores, without the bias, over their
    sum if ``norm_topk_prob``, times ``scale``. Weights and scores have gradients; the bias only
    routes.
    """
    if _runs_kernel(logits):
        options = (top_k, n_group, topk_group, norm_topk_prob, scale)
        return _Route.apply(logits.contiguous(), bias, *options)
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, top_k, n_group, topk_group)
    weights = scores.gather(1, experts)
    if norm_topk_prob:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    loads = experts.flatten().bincount(minlength=len(bias))
    return experts, weights * scale, scores, loads


def choose(
    biased: Float[Tensor, "tokens experts"], top_k: int, n_group: int, topk_group: int
) -> Int[Tensor, "tokens top_k"]:
    """Top-k experts within the best groups; a group is worth its two best biased scores."""
    if topk_group < n_group:
        grouped = biased.unflatten(1, (n_group, -1))
        worth = grouped.topk(2, dim=-1).values.sum(-1)
        kept = worth.topk(topk_group, dim=1, sorted=False).indices
        # -inf and not 0: a biased score may be negative, and 0 would then win.
        handicap = torch.full_like(worth, float("-inf")).scatter_(1, kept, 0.0)
        biased = (grouped + handicap.unsqueeze(-1)).flatten(1)
    return biased.topk(top_k, dim=1, sorted=False).indices


def count_top_k(
    scores: Float[Tensor, "batch seq experts"], top_k: int
) -> Int[Tensor, "batch experts"]:
    """Tokens of each sequence that have an expert among their ``top_k`` best scores."""
    if _runs_kernel(scores):
        from whalefall.kernels import route as kernel

        return kernel.count_top_k(scores.contiguous(), top_k)
    best = scores.topk(top_k, dim=-1, sorted=False).indices.flatten(1)
    counts = best.new_zeros(len(best), scores.shape[-1])
    return counts.scatter_add_(1, best, torch.ones_like(best))


def _runs_kernel(x: Tensor) -> bool:
    """The gate is FP32; no kernel takes it in less."""
    return x.is_cuda and x.dtype == torch.float32


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, *options: Any) -> Routed:
        from whalefall.kernels import route as kernel

        experts, weights, scores, loads = kernel.forward(logits, bias, *options)
        ctx.save_for_backward(scores, experts)
        ctx.mark_non_differentiable(experts, loads)
        ctx.set_materialize_grads(False)
        *_, ctx.norm_topk_prob, ctx.scale = options
        return experts, weights, scores, loads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import route as kernel

        scores, experts = ctx.saved_tensors
        _, of_weights, of_scores, _ = (None if g is None else g.contiguous() for g in grads)
        options = (ctx.norm_topk_prob, ctx.scale)
        grad = kernel.backward(scores, experts, of_weights, of_scores, *options)
        return grad, *[None] * 6
