"""Which experts a token goes to: sigmoid scores, groups, and a bias that only routes.

Paper 2.1.2, equations 12 to 20. Balance comes from the bias (``train/balance.py`` moves it after
each step); the sequence-wise loss is a small complement within single sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.ops.gate import Sorted, gate
from whalefall.ops.linear_fp32 import linear_fp32
from whalefall.ops.route import count_top_k, route


class RouteOptions(TypedDict):
    """Of ``ops.route``."""

    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    scale: float


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
        self.block_rows: int | None = None
        """As ``Linear.block_rows``."""
        self._options = RouteOptions(
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            norm_topk_prob=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Cast with the network, the bias stays FP32: BF16 would lose its steps of 0.001."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        logits = linear_fp32(x, self.weight)
        return Routing(*route(logits, self.e_score_correction_bias, **self._options))

    def sort(self, x: Float[Tensor, "tokens hidden"]) -> Sorted:
        """Where the tokens go, and their rows sorted by expert: for inference."""
        bias = self.e_score_correction_bias
        return gate(x, self.weight, bias, **self._options, block_rows=self.block_rows)


def sequence_balance_loss(
    scores: Float[Tensor, "batch seq experts"], top_k: int
) -> Float[Tensor, ""]:
    """sum_i f_i P_i, averaged over the sequences (equations 17 to 20, without alpha).

    f_i is the share of the sequence's tokens whose unbiased top-k holds expert i, times
    experts / top_k; P_i the mean of s_i over the token's sum of scores. Perfect balance gives 1.
    """
    _, seq, experts = scores.shape
    counts = count_top_k(scores.detach(), top_k).type_as(scores)
    frequency = counts * (experts / (top_k * seq))
    # Summed over experts first: s / sum(s), as wide as the scores, is never made.
    weighted = (scores @ frequency.unsqueeze(-1)).squeeze(-1)
    return (weighted / scores.sum(-1)).mean()
