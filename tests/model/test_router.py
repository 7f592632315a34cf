"""The gate: cases worked out by hand, what holds for every input, and the balance loss by loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model.router import Router, Routing, sequence_balance_loss

# Four groups of two experts; the groups' sums are 1.0, 1.1, 0.85 and 0.5.
SCORES = [0.9, 0.1, 0.6, 0.5, 0.8, 0.05, 0.3, 0.2]


def router(
    experts: int = 8,
    top_k: int = 3,
    groups: int = 4,
    open_groups: int = 2,
    hidden: int | None = None,
    **others: object,
) -> Router:
    """A router whose weight is the identity: with hidden = experts, scores are sigmoid(x)."""
    config = ModelConfig.model_validate(
        {
            "hidden_size": hidden or experts,
            "n_routed_experts": experts,
            "num_experts_per_tok": top_k,
            "n_group": groups,
            "topk_group": open_groups,
            **others,
        }
    )
    gate = Router(config)
    gate.weight.data = torch.eye(experts, config.hidden_size)
    return gate


def route(gate: Router, scores: list[float], bias: list[float] | None = None) -> Routing:
    """The routing of one token with these scores."""
    if bias is not None:
        gate.e_score_correction_bias.copy_(torch.tensor(bias))
    return gate(torch.logit(torch.tensor([scores])))


def chosen(routing: Routing, token: int = 0) -> dict[int, float]:
    """Expert to weight of one token."""
    experts, weights = routing.experts[token].tolist(), routing.weights[token].tolist()
    return dict(zip(experts, weights, strict=True))


def test_the_best_experts_of_the_best_groups() -> None:
    # Groups 0 and 1 are open: 0.9, 0.6, 0.5. Expert 4 (0.8) is second of all, but its group is
    # closed. The sum is 2.0 and the factor 2.5.
    assert chosen(route(router(), SCORES)) == pytest.approx({0: 1.125, 2: 0.75, 3: 0.625})


def test_a_group_counts_its_two_best() -> None:
    # Two groups of four. Sums of all: 1.6 and 1.7; of the two best: 0.9 + 0.6 and 0.5 + 0.4.
    scores = [0.9, 0.6, 0.05, 0.05, 0.5, 0.4, 0.4, 0.4]
    routing = route(router(top_k=2, groups=2, open_groups=1), scores)
    assert chosen(routing) == pytest.approx({0: 1.5, 1: 1.0})


def test_one_group_is_a_plain_top_k() -> None:
    routing = route(router(top_k=2, groups=1, open_groups=1), SCORES)
    assert chosen(routing) == pytest.approx({0: 2.5 * 0.9 / 1.7, 4: 2.5 * 0.8 / 1.7})


def test_the_bias_chooses_and_the_scores_weigh() -> None:
    # 0.9 more on expert 6 lifts group 3 to 1.4: open are 3 and 1, best 1.2, 0.6, 0.5. The weights
    # know nothing of it: 0.3, 0.6, 0.5 over 1.4, times 2.5.
    routing = route(router(), SCORES, bias=[0, 0, 0, 0, 0, 0, 0.9, 0])
    expected = {6: 2.5 * 0.3 / 1.4, 2: 2.5 * 0.6 / 1.4, 3: 2.5 * 0.5 / 1.4}
    assert chosen(routing) == pytest.approx(expected)


def test_negative_scores_of_open_groups_beat_closed_groups() -> None:
    # All biased scores are negative. The order is that of the scores, so nothing may change; a
    # mask of 0 instead of -inf would send the token to the closed groups.
    plain, shifted = route(router(), SCORES), route(router(), SCORES, bias=[-2.0] * 8)
    assert chosen(shifted) == pytest.approx(chosen(plain))


def test_an_open_group_is_used_up_before_a_closed_one() -> None:
    # top_k takes all four experts of two groups. Biased: (0.9, -0.3), (0.6, 0.5), (0.25, 0.05),
    # (0.1, 0.2): groups 1 and 0 are open, and expert 1 is chosen at -0.3 though 4 has 0.25.
    routing = route(router(top_k=4), SCORES, bias=[0, -0.4, 0, 0, -0.55, 0, -0.2, 0])
    assert set(chosen(routing)) == {0, 1, 2, 3}


@pytest.mark.parametrize("norm", [True, False])
def test_weights_are_normalised_when_asked_to(norm: bool) -> None:
    gate = router(norm_topk_prob=norm, routed_scaling_factor=2.0)
    total = 2.0 if norm else 1.0
    expected = {0: 0.9 * 2 / total, 2: 0.6 * 2 / total, 3: 0.5 * 2 / total}
    assert chosen(route(gate, SCORES)) == pytest.approx(expected)


def test_ties_still_choose_distinct_experts_of_open_groups() -> None:
    routing = router()(torch.zeros(5, 8))
    for token in range(5):
        experts = set(routing.experts[token].tolist())
        assert len(experts) == 3 and len({expert // 2 for expert in experts}) <= 2


@st.composite
def routings(draw: st.DrawFn) -> tuple[Router, Tensor, Routing]:
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    open_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, open_groups * size))
    gate = router(groups * size, top_k, groups, open_groups, hidden=6)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    gate.weight.data.normal_(generator=generator)
    # Biases of 0, of the size of scores, and far larger ones of both signs.
    scale = draw(st.sampled_from([0.0, 0.5, 10.0]))
    gate.e_score_correction_bias.normal_(generator=generator).mul_(scale)
    x = torch.randn(draw(st.integers(0, 12)), 6, generator=generator)
    return gate, x, gate(x)


@settings(deadline=None)
@given(routings())
def test_every_token_has_top_k_experts_in_few_groups(case: tuple[Router, Tensor, Routing]) -> None:
    gate, x, routing = case
    config = gate.config
    assert routing.experts.shape == (len(x), config.num_experts_per_tok)
    for row in routing.experts.tolist():
        assert len(set(row)) == config.num_experts_per_tok
        assert set(row) <= set(range(config.n_routed_experts))
        size = config.n_routed_experts // config.n_group
        assert len({expert // size for expert in row}) <= config.topk_group


@settings(deadline=None)
@given(routings())
def test_weights_depend_on_the_scores_alone(case: tuple[Router, Tensor, Routing]) -> None:
    gate, x, routing = case
    scores = torch.sigmoid(x.double() @ gate.weight.double().T)
    torch.testing.assert_close(routing.scores.double(), scores, rtol=1e-5, atol=1e-6)
    of_choice = scores.gather(1, routing.experts)
    expected = 2.5 * of_choice / of_choice.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights.double(), expected, rtol=1e-5, atol=1e-6)
    sums = routing.weights.sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, gate.config.routed_scaling_factor))


@settings(deadline=None)
@given(routings())
def test_loads_count_every_choice(case: tuple[Router, Tensor, Routing]) -> None:
    gate, x, routing = case
    assert routing.loads.sum() == len(x) * gate.config.num_experts_per_tok
    counted = torch.bincount(routing.experts.flatten(), minlength=gate.config.n_routed_experts)
    assert torch.equal(routing.loads, counted)


def test_the_gate_is_fp32_in_a_bf16_network() -> None:
    gate = router(hidden=64)
    gate.weight.data = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = gate(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    exact = torch.sigmoid(x.double() @ gate.weight.double().T)
    torch.testing.assert_close(routing.scores.double(), exact, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_gate_and_not_the_bias() -> None:
    gate = router(hidden=6)
    generator = torch.Generator().manual_seed(0)
    gate.weight.data.normal_(generator=generator)
    gate.e_score_correction_bias.normal_(generator=generator)
    assert not gate.e_score_correction_bias.requires_grad
    gate.e_score_correction_bias.requires_grad_()
    x = torch.randn(7, 6, generator=generator).requires_grad_()
    routing = gate(x)
    outer = torch.randn(routing.weights.shape, generator=generator)
    own = torch.autograd.grad(
        routing.weights,
        (gate.weight, x, gate.e_score_correction_bias),
        outer,
        allow_unused=True,
    )
    assert own[2] is None

    weight, inputs = gate.weight.detach().double(), x.detach().double()
    scores = torch.sigmoid(inputs.requires_grad_() @ weight.requires_grad_().T)
    of_choice = scores.gather(1, routing.experts)
    expected = 2.5 * of_choice / of_choice.sum(1, keepdim=True)
    right = torch.autograd.grad(expected, (weight, inputs), outer.double())
    for one, other in zip(own[:2], right, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def balance_by_loops(scores: Tensor, top_k: int) -> float:
    """Equations 17 to 20 for one sequence, token by token and expert by expert."""
    length, experts = scores.shape
    rows = scores.double().tolist()
    total = 0.0
    for expert in range(experts):
        held = sum(expert in sorted(range(experts), key=lambda i: -s[i])[:top_k] for s in rows)
        frequency = experts / (top_k * length) * held
        probability = sum(s[expert] / sum(s) for s in rows) / length
        total += frequency * probability
    return total


def random_scores(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("length", "experts", "top_k"), [(7, 6, 2), (1, 4, 1), (5, 3, 3)])
def test_balance_is_the_papers_per_sequence(length: int, experts: int, top_k: int) -> None:
    scores = random_scores(3, length, experts)
    expected = sum(balance_by_loops(sequence, top_k) for sequence in scores) / 3
    assert sequence_balance_loss(scores, top_k).item() == pytest.approx(expected, abs=1e-12)


def test_perfect_balance_is_one() -> None:
    # Token t prefers experts t, t+1 of 6: each expert is held twice, with the same mean score.
    row = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.15, 0.05])
    scores = torch.stack([row.roll(shift) for shift in range(6)]).unsqueeze(0)
    assert sequence_balance_loss(scores, 2).item() == pytest.approx(1.0)


def test_two_lopsided_sequences_do_not_balance_each_other() -> None:
    # 4 experts, top 1. Every token of the first sequence holds expert 0 (f = 4), of the second
    # expert 1; P of the held one is 0.7, so each sequence and their mean is 2.8.
    first, second = [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]
    scores = torch.tensor([[first] * 5, [second] * 5])
    assert sequence_balance_loss(scores, 1).item() == pytest.approx(2.8)


def test_balance_gradients() -> None:
    scores = random_scores(2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2), scores)


def test_balance_gradient_pushes_the_overloaded_expert_down() -> None:
    scores = torch.tensor([[[0.7, 0.2, 0.1]] * 4]).requires_grad_()
    (grad,) = torch.autograd.grad(sequence_balance_loss(scores, 1), scores)
    assert (grad[..., 0] > 0).all() and (grad[..., 1:] < 0).all()
