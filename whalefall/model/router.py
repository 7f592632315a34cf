"""Which experts a token goes to: sigmoid scores, groups, and a bias that only routes.

Paper 2.1.2, equations 12 to 20. Balance comes from the bias (``train/balance.py`` moves it after
each step); the sequence-wise loss is a small complement within single sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from whalefall.config.model import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one layer go."""

    experts: Int[Tensor, "tokens top_k"]
    weights: Float[Tensor, "tokens top_k"]
    """Share of each chosen expert's output, FP32; carries the gradient to the scores."""
    scores: Float[Tensor, "tokens experts"]
    """Unbiased affinities s, FP32."""
    loads: Int[Tensor, "experts"]
    """Tokens each expert received."""


class Router(nn.Module):
    """The gate, computed in FP32 whatever the network's type (paper 3.3.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        self.e_score_correction_bias: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast with the network, the bias stays FP32: BF16 would lose its steps of 0.001."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        experts = self._choose(scores.detach() + self.e_score_correction_bias)
        weights = scores.gather(1, experts)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return Routing(
            experts, weights * self.config.routed_scaling_factor, scores, self._count(experts)
        )

    def _choose(self, biased: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens top_k"]:
        """Top-k experts within the best groups; a group is worth its two best biased scores."""
        config = self.config
        if config.topk_group < config.n_group:
            grouped = biased.unflatten(1, (config.n_group, -1))
            worth = grouped.topk(2, dim=-1).values.sum(-1)
            kept = worth.topk(config.topk_group, dim=1, sorted=False).indices
            # -inf and not 0: a biased score may be negative, and 0 would then win.
            handicap = torch.full_like(worth, float("-inf")).scatter_(1, kept, 0.0)
            biased = (grouped + handicap.unsqueeze(-1)).flatten(1)
        return biased.topk(config.num_experts_per_tok, dim=1, sorted=False).indices

    def _count(self, experts: Int[Tensor, "tokens top_k"]) -> Int[Tensor, "experts"]:
        flat, size = experts.flatten(), self.config.n_routed_experts
        if not flat.is_cuda:
            return flat.bincount(minlength=size)
        # bincount would wait for the device to learn its length.
        loads = torch.zeros(size, dtype=torch.int64, device=flat.device)
        return loads.scatter_add_(0, flat, torch.ones_like(flat))


def sequence_balance_loss(
    scores: Float[Tensor, "batch seq experts"], top_k: int
) -> Float[Tensor, ""]:
    """sum_i f_i P_i, averaged over the sequences (equations 17 to 20, without alpha).

    f_i is the share of the sequence's tokens whose unbiased top-k holds expert i, times
    experts / top_k; P_i the mean of s_i over the token's sum of scores. Perfect balance gives 1.
    """
    _, seq, experts = scores.shape
    chosen = scores.detach().topk(top_k, dim=-1, sorted=False).indices
    counts = torch.zeros_like(scores[:, 0]).scatter_add_(
        1, chosen.flatten(1), torch.ones_like(chosen.flatten(1), dtype=scores.dtype)
    )
    frequency = counts * (experts / (top_k * seq))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (frequency * probability).sum(-1).mean()
