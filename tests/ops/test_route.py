"""The gate's choice and its gradients, against sorting in Python and autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.route import choose, count_top_k, route

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# Experts, top-k, groups, open groups: bench-6b, V3, Moonlight, Kimi K2; sizes that are no powers of
# two; every expert chosen; no choice at all.
GATES = [
    (64, 6, 8, 4), (256, 8, 8, 4), (64, 6, 1, 1), (384, 8, 1, 1), (512, 8, 16, 4),
    (15, 4, 3, 2), (15, 3, 5, 2), (8, 4, 4, 2), (6, 6, 1, 1), (1, 1, 1, 1),
]  # fmt: skip


def problem(experts: int, tokens: int, bias: float, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts + tokens)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    biases = bias * torch.randn(experts, generator=generator)
    return logits.to(device).requires_grad_(), biases.to(device)


def by_sorting(biased: list[float], top_k: int, groups: int, open_groups: int) -> list[int]:
    """The choice of one token; the lower index wins a tie."""
    size = len(biased) // groups
    worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: (-worth[g], g))[:open_groups]
    allowed = [e for e in range(len(biased)) if e // size in kept]
    return sorted(allowed, key=lambda e: (-biased[e], e))[:top_k]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("bias", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
def test_what_a_token_gets(
    gate: tuple[int, int, int, int], bias: float, norm: bool, device: str
) -> None:
    size, top_k, groups, open_groups = gate
    logits, biases = problem(size, 37, bias, device)
    experts, weights, scores, loads = route(
        logits, biases, top_k=top_k, n_group=groups, topk_group=open_groups,
        norm_topk_prob=norm, scale=2.5,
    )  # fmt: skip
    exact = logits.detach().double().requires_grad_()
    torch.testing.assert_close(scores.double(), exact.sigmoid(), rtol=3e-6, atol=1e-12)
    for own, biased in zip(experts.tolist(), (scores + biases).tolist(), strict=True):
        assert len(set(own)) == top_k
        assert set(own) == set(by_sorting(biased, top_k, groups, open_groups))
    assert torch.equal(loads, torch.bincount(experts.flatten(), minlength=size))

    expected = exact.sigmoid().gather(1, experts)
    expected = 2.5 * (expected / expected.sum(1, keepdim=True) if norm else expected)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    of_weights = torch.randn(weights.shape, generator=generator).to(device)
    of_scores = torch.randn(scores.shape, generator=generator).to(device)
    right = (exact.sigmoid(), expected)
    for use_scores, use_weights in ((True, True), (True, False), (False, True)):
        outer = (of_scores * use_scores, of_weights * use_weights)
        used = [i for i, use in enumerate((use_scores, use_weights)) if use]
        (grad,) = torch.autograd.grad(
            [(scores, weights)[i] for i in used], logits, [outer[i] for i in used],
            retain_graph=True,
        )  # fmt: skip
        (exact_grad,) = torch.autograd.grad(
            right, exact, [value.double() for value in outer], retain_graph=True
        )
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    logits, biases = problem(8, 0, 0.3, device)
    experts, weights, scores, loads = route(
        logits, biases, top_k=2, n_group=4, topk_group=2, norm_topk_prob=True, scale=1.0
    )
    assert experts.shape == weights.shape == (0, 2) and scores.shape == (0, 8)
    assert torch.equal(loads, torch.zeros_like(loads))
    (grad,) = torch.autograd.grad(weights.sum() + scores.sum(), logits)
    assert grad.shape == (0, 8)


@settings(deadline=None)
@given(st.data())
def test_the_choice_is_that_of_sorting(data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    open_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, open_groups * size))
    # All different, and so are the sums of two: nothing ties.
    powers = data.draw(st.permutations(range(groups * size)))
    biased = [float(2**power) * (-1) ** power for power in powers]
    own = choose(torch.tensor([biased]).double(), top_k, groups, open_groups)
    assert set(own[0].tolist()) == set(by_sorting(biased, top_k, groups, open_groups))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("experts", [1, 5, 64, 384])
def test_sequences_are_counted_apart(experts: int, device: str) -> None:
    scores = problem(experts, 3 * 41, 0.0, device)[0].detach().sigmoid().view(3, 41, experts)
    top_k = min(6, experts)
    expected = torch.zeros(3, experts, dtype=torch.int64)
    for sequence, rows in enumerate(scores.tolist()):
        for row in rows:
            expected[sequence, by_sorting(row, top_k, 1, 1)] += 1
    assert torch.equal(count_top_k(scores, top_k).cpu(), expected)


@pytest.mark.gpu
def test_cuda_prefers_lower_indices_where_scores_tie() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (50, 64), generator=generator).float().cuda()
    biases = torch.zeros(64, device="cuda")
    experts, _, scores, _ = route(
        logits, biases, top_k=6, n_group=8, topk_group=4, norm_topk_prob=True, scale=1.0
    )
    for own, biased in zip(experts.tolist(), scores.tolist(), strict=True):
        assert own == by_sorting(biased, 6, 8, 4)


@pytest.mark.gpu
def test_cuda_survives_what_is_not_a_number() -> None:
    logits = torch.zeros(3, 64, device="cuda")
    logits[1], logits[2, 5] = float("nan"), float("nan")
    experts, weights, _, loads = route(
        logits, torch.zeros(64, device="cuda"),
        top_k=6, n_group=8, topk_group=4, norm_topk_prob=True, scale=1.0,
    )  # fmt: skip
    assert all(len(set(row)) == 6 and max(row) < 64 for row in experts.tolist())
    assert loads.sum() == 18
    assert weights[0].isfinite().all() and weights[1:].isnan().all()


@pytest.mark.gpu
def test_cuda_extremes_have_finite_weights_and_gradients() -> None:
    logits = torch.tensor([[1e4] * 8, [-1e4] * 8, [1e4, -1e4] * 4, [0.0] * 8], device="cuda")
    logits.requires_grad_()
    _, weights, scores, _ = route(
        logits, torch.zeros(8, device="cuda"),
        top_k=4, n_group=4, topk_group=2, norm_topk_prob=True, scale=2.5,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(weights.square().sum() + scores.sum(), logits)
    assert weights.isfinite().all() and grad.isfinite().all()
