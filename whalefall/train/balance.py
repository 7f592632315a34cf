"""Auxiliary-loss-free load balancing: a bias per expert, moved after each step (paper 2.1.2)."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.model.router import Router


@torch.no_grad()
def update_biases(
    routers: Sequence[Router], expert_loads: Int[Tensor, "layers experts"], speed: float
) -> None:
    """Lower the bias of every expert loaded above its layer's mean by ``speed``, raise the others'.

    ``expert_loads`` counts the tokens of the whole global batch, in the order of ``routers``;
    ``speed`` is gamma. An expert exactly at the mean keeps its bias. The bias only chooses experts:
    no gradient and no output weight sees it (arXiv 2408.15664).
    """
    # In integers: a large batch has more tokens than FP32 can count.
    excess = expert_loads * expert_loads.shape[1] - expert_loads.sum(1, keepdim=True)
    for router, direction in zip(routers, excess.sign(), strict=True):
        router.e_score_correction_bias.sub_(direction, alpha=speed)


def sum_over_ranks(expert_loads: Int[Tensor, "layers experts"]) -> Int[Tensor, "layers experts"]:
    """The loads of all ranks' tokens, where there are ranks; in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(expert_loads)
    return expert_loads


def max_violation(expert_loads: Int[Tensor, "layers experts"]) -> Float[Tensor, "layers"]:
    """MaxVio: the largest load over the mean load, minus 1; 0 is perfect balance."""
    loads = expert_loads.double()
    return loads.amax(1) / loads.mean(1) - 1


def load_shares(expert_loads: Int[Tensor, "layers experts"]) -> list[list[float]]:
    """Each expert's share of its layer's load, to six digits."""
    shares = expert_loads.double() / expert_loads.sum(1, keepdim=True)
    return [[round(share, 6) for share in layer] for layer in shares.tolist()]
