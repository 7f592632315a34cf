"""The bias alone balances a skewed router (paper 2.1.2)."""

import torch

from whalefall.config.model import ModelConfig
from whalefall.model.router import Router
from whalefall.train.balance import max_violation, update_biases

CONFIG = ModelConfig(
    hidden_size=32, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=2
)


def skewed_router() -> Router:
    """Features with a mean, and a gate that likes them in a few experts."""
    torch.manual_seed(0)
    router = Router(CONFIG)
    with torch.no_grad():
        router.weight.normal_(std=0.05)
        router.weight[:3] += 0.05
    return router


def features(step: int) -> torch.Tensor:
    return torch.randn(512, 32, generator=torch.Generator().manual_seed(step)) + 0.5


def test_a_skewed_router_comes_to_balance_within_300_steps() -> None:
    router = skewed_router()
    weights = router.weight.detach().clone()
    assert max_violation(router(features(0)).loads[None]) > 3
    for step in range(300):
        update_biases([router], router(features(step)).loads[None], speed=0.005)
    unseen = torch.stack([router(features(step)).loads for step in range(1000, 1010)]).sum(0)
    assert max_violation(unseen[None]) < 0.5
    assert torch.equal(router.weight, weights)


def test_each_bias_moves_by_the_speed_towards_the_mean() -> None:
    router = Router(CONFIG)
    loads = torch.full((1, 16), 10)
    loads[0, :3] = torch.tensor([15, 4, 11])
    update_biases([router], loads, speed=0.25)
    expected = torch.zeros(16)
    expected[:3] = torch.tensor([-0.25, 0.25, -0.25])
    assert torch.equal(router.e_score_correction_bias, expected)


def test_a_difference_of_one_token_counts_in_a_global_batch() -> None:
    """62.9 M tokens by 8 experts: FP32 could not tell these loads apart."""
    router = Router(CONFIG)
    loads = torch.full((1, 16), 31_457_280)
    loads[0, 0] += 1
    loads[0, 1] -= 1
    update_biases([router], loads, speed=1.0)
    assert router.e_score_correction_bias[:3].tolist() == [-1, 1, 0]


def test_max_violation() -> None:
    loads = torch.tensor([[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0]])
    assert max_violation(loads).tolist() == [0.0, 1.0, 3.0]
