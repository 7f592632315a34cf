"""The gate of a layer: logits, choice, the count for the balance loss, and the way back."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.linear_fp32 import linear_fp32
from whalefall.ops.route import choose, count_top_k, route

TOKENS, SEQUENCES, TOP_K, EXPERTS, HIDDEN = 16384, 4, 6, 64, 2048
TABLE = TOKENS * EXPERTS * 4  # bytes of [tokens, experts] in FP32
CHOICES = TOKENS * TOP_K * (8 + 4)  # of experts and their weights


def ours(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return route(logits, bias, top_k=TOP_K, n_group=8, topk_group=4, norm_topk_prob=True, scale=2.5)


def by_torch(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.sigmoid()
    experts = choose(scores.detach() + bias, TOP_K, 8, 4)
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * 2.5
    loads = torch.zeros(EXPERTS, dtype=torch.int64, device=logits.device)
    flat = experts.flatten()
    return experts, weights, scores, loads.scatter_add_(0, flat, torch.ones_like(flat))


def count_by_torch(scores: Tensor) -> Tensor:
    chosen = scores.topk(TOP_K, dim=-1, sorted=False).indices.flatten(1)
    return torch.zeros_like(scores[:, 0]).scatter_add_(1, chosen, torch.ones_like(chosen).float())


def rows() -> Iterator[Row]:
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "generator": generator}
    x = torch.randn(TOKENS, HIDDEN, **like).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(EXPERTS, HIDDEN, **like)).bfloat16().requires_grad_()
    bias = 0.01 * torch.randn(EXPERTS, **like)
    outer = torch.randn(TOKENS, EXPERTS, **like)
    flops = 2 * TOKENS * HIDDEN * EXPERTS
    logits, wide = linear_fp32(x, weight), F.linear(x.float(), weight.float())
    yield Row(
        "gate: logits",
        lambda: linear_fp32(x, weight),
        bytes=2 * x.numel() + TABLE,
        flops=flops,
        peer=lambda: F.linear(x.float(), weight.float()),
        peer_name="FP32 linear",
    )
    yield Row(
        "gate: logits, backward",
        lambda: torch.autograd.grad(logits, (x, weight), outer, retain_graph=True),
        bytes=2 * 2 * x.numel() + TABLE,
        flops=2 * flops,
        peer=lambda: torch.autograd.grad(wide, (x, weight), outer, retain_graph=True),
        peer_name="FP32 linear",
    )
    logits = logits.detach().requires_grad_()
    yield Row(
        "gate: choice",
        lambda: ours(logits, bias),
        bytes=2 * TABLE + CHOICES,
        peer=lambda: by_torch(logits, bias),
        peer_name="torch.topk",
    )
    (_, own, scores, _), (_, right, all_scores, _) = ours(logits, bias), by_torch(logits, bias)
    of_weights = torch.randn(TOKENS, TOP_K, **like)
    yield Row(
        "gate: choice, backward",
        lambda: torch.autograd.grad((own, scores), logits, (of_weights, outer), retain_graph=True),
        bytes=3 * TABLE + CHOICES,
        peer=lambda: torch.autograd.grad(
            (right, all_scores), logits, (of_weights, outer), retain_graph=True
        ),
        peer_name="autograd",
    )
    by_sequence = scores.detach().unflatten(0, (SEQUENCES, -1))
    yield Row(
        "gate: count by sequence",
        lambda: count_top_k(by_sequence, TOP_K),
        bytes=TABLE,
        peer=lambda: count_by_torch(by_sequence),
        peer_name="torch.topk",
    )
