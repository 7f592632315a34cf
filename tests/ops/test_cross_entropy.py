"""Head and cross-entropy in one: the definition's numbers and gradients, without its logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from whalefall.ops import cross_entropy
from whalefall.ops.cross_entropy import IGNORED, linear_cross_entropy, reference

VOCAB, HIDDEN = 37, 8
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(tokens: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Random inputs whose every fourth target is ignored and every fifth weight is zero."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype, generator=generator)
    head = torch.randn(VOCAB, HIDDEN, dtype=dtype, generator=generator)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    targets[3::4] = IGNORED
    weights = torch.rand(tokens, generator=generator)
    weights[4::5] = 0
    return hidden.requires_grad_(), head.requires_grad_(), targets, weights


def by_definition(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """-log(exp(z_target) / sum_j exp(z_j)), token by token, in float64."""
    parts = []
    for x, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target == IGNORED:
            parts.append(torch.zeros((), dtype=torch.float64))
            continue
        exponentials = torch.stack([(x * row).sum() for row in head.double()]).exp()
        parts.append(-(exponentials[target] / exponentials.sum()).log())
    nll = torch.stack(parts)
    return (nll * weights).sum(), nll.detach()


def gradients(total: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_a_chunk", [1, 3, 4, 12, 13, 100])
@pytest.mark.parametrize("tokens", [1, 13])
def test_equals_the_definition_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows_a_chunk: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", rows_a_chunk * VOCAB)
    hidden, head, targets, weights = problem(tokens, dtype)
    expected, expected_nll = by_definition(hidden, head, targets, weights)
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    assert total.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nll.double(), expected_nll, rtol=1e-5, atol=1e-6)
    for own, right in zip(
        gradients(total, hidden, head), gradients(expected, hidden, head), strict=True
    ):
        assert own.dtype == dtype
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-6)


def test_the_plain_reference_is_the_definition() -> None:
    hidden, head, targets, weights = problem(13)
    expected, expected_nll = by_definition(hidden, head, targets, weights)
    total, nll = reference(hidden, head, targets, weights)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(nll, expected_nll)


def test_an_ignored_target_counts_nowhere() -> None:
    hidden, head, targets, weights = problem(13)
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    (grad,) = gradients(total, hidden)
    ignored = targets == IGNORED
    assert ignored.any() and (nll[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert (nll[~ignored] > 0).all()


def test_a_zero_weight_leaves_the_nll_but_no_gradient() -> None:
    hidden, head, targets, weights = problem(13)
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    (grad,) = gradients(total, hidden)
    silent = (weights == 0) & (targets != IGNORED)
    assert silent.any() and (nll[silent] > 0).all() and (grad[silent] == 0).all()


def test_all_ignored_is_zero_and_not_nan() -> None:
    hidden, head, targets, weights = problem(5)
    total, nll = linear_cross_entropy(hidden, head, torch.full_like(targets, IGNORED), weights)
    assert total == 0 and (nll == 0).all()
    for grad in gradients(total, hidden, head):
        assert (grad == 0).all()


@pytest.mark.parametrize("trained", ["hidden", "head"])
def test_one_side_may_be_frozen(trained: str) -> None:
    hidden, head, targets, weights = problem(13)
    expected = dict(
        zip(
            ("hidden", "head"),
            gradients(by_definition(hidden, head, targets, weights)[0], hidden, head),
            strict=True,
        )
    )
    inputs = {"hidden": hidden.detach(), "head": head.detach()}
    inputs[trained].requires_grad_()
    total, _ = linear_cross_entropy(inputs["hidden"], inputs["head"], targets, weights)
    (grad,) = gradients(total, inputs[trained])
    torch.testing.assert_close(grad, expected[trained], rtol=1e-5, atol=1e-6)


def test_gradients_follow_the_outer_factor() -> None:
    hidden, head, targets, weights = problem(13)
    once = gradients(linear_cross_entropy(hidden, head, targets, weights)[0], hidden, head)
    scaled = linear_cross_entropy(hidden, head, targets, weights)[0] * -4 + 1
    for one, four in zip(once, gradients(scaled, hidden, head), strict=True):
        assert torch.equal(four, -4 * one)


def test_a_second_backward_raises() -> None:
    hidden, head, targets, weights = problem(5)
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    assert not nll.requires_grad
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_without_gradients_only_the_numbers_are_made() -> None:
    hidden, head, targets, weights = problem(5)
    expected, _ = by_definition(hidden, head, targets, weights)
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden, head, targets, weights)
    assert not total.requires_grad
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    head = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    total, nll = linear_cross_entropy(hidden, head, torch.tensor([0, 0]), torch.ones(2))
    # Logits (1e4, 0, -1e4) and their mirror: sure and right, then sure and wrong by 2e4 nats.
    assert nll.tolist() == [0.0, 2e4]
    assert all(torch.isfinite(grad).all() for grad in gradients(total, hidden, head))


def test_bfloat16_inputs_keep_an_fp32_loss() -> None:
    hidden, head, targets, weights = problem(13, torch.bfloat16)
    expected, _ = by_definition(hidden, head, targets, weights)
    total, _ = linear_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)
    for own, right in zip(
        gradients(total, hidden, head), gradients(expected, hidden, head), strict=True
    ):
        assert own.dtype == torch.bfloat16
        assert (own - right).norm() < 2e-2 * right.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def largest_tensor(function: Any, inputs: Problem) -> int:
    with LargestTensor() as seen:
        function(*inputs)[0].backward()
    return seen.elements


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows_a_chunk = 40, 10
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", rows_a_chunk * VOCAB)
    inputs = problem(tokens)
    assert largest_tensor(reference, inputs) == tokens * VOCAB  # the measure sees what it should
    assert largest_tensor(linear_cross_entropy, inputs) == rows_a_chunk * VOCAB
