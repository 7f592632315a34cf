"""Head and cross-entropy in one: the definition's numbers and gradients, without its logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", rows_a_chunk)
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
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", rows_a_chunk)
    inputs = problem(tokens)
    assert largest_tensor(reference, inputs) == tokens * VOCAB  # the measure sees what it should
    assert largest_tensor(linear_cross_entropy, inputs) == rows_a_chunk * VOCAB


def cuda_problem(tokens: int, vocab: int, dtype: torch.dtype) -> Problem:
    """As ``problem``, with logits of about 1 and 64 hidden numbers."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 64, generator=generator).to("cuda", dtype)
    head = (torch.randn(vocab, 64, generator=generator) / 8).to("cuda", dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator).cuda()
    targets[3::4] = IGNORED
    weights = torch.rand(tokens, generator=generator).cuda()
    weights[4::5] = 0
    return hidden.requires_grad_(), head.requires_grad_(), targets, weights


def error(own: Tensor, right: Tensor) -> float:
    right = right.double()
    return float((own.double() - right).norm() / right.norm().clamp(min=1e-30))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_a_chunk", [5, 300])
@pytest.mark.parametrize("tokens", [0, 1, 13, 300])
@pytest.mark.parametrize("vocab", [37, 1000, 8192 + 16])
def test_cuda_agrees_with_the_definition(
    monkeypatch: pytest.MonkeyPatch, vocab: int, tokens: int, rows_a_chunk: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS_CUDA", rows_a_chunk * vocab)
    hidden, head, targets, weights = cuda_problem(tokens, vocab, dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]
    expected, expected_nll = reference(*wide, targets, weights.double())
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    exact = dtype == torch.float32
    assert error(nll, expected_nll) < (1e-5 if exact else 3e-3)
    assert error(total, expected) < (1e-5 if exact else 3e-3)
    assert (nll[targets == IGNORED] == 0).all()
    for own, right in zip(
        gradients(total * 3, hidden, head), gradients(expected * 3, *wide), strict=True
    ):
        assert own.dtype == dtype
        # BF16 rounds the logits, their gradient and the product.
        assert error(own, right) < (1e-5 if exact else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 37, 8192, 8193, 65537, 129280])
def test_the_kernel_alone_on_logits_of_any_size(vocab: int, dtype: torch.dtype) -> None:
    from whalefall.kernels import cross_entropy as kernel

    rows = 8
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[1] = 0
    logits[2, vocab // 2] = 1e4  # sure
    logits[3] -= 1e4
    logits[4, 0], logits[4, -1] = -1e4, 1e4
    logits[6, : vocab // 2] = float("-inf")  # impossible, whole blocks of them
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[2], targets[4], targets[5], targets[6] = vocab // 2, 0, IGNORED, vocab - 1
    weights = torch.rand(rows, generator=generator)
    logits, targets, weights = logits.to("cuda", dtype), targets.cuda(), weights.cuda()

    wide = logits.double().requires_grad_()
    right = F.cross_entropy(wide, targets, reduction="none", ignore_index=IGNORED)
    (right_grad,) = torch.autograd.grad((right * weights).sum(), wide)
    nll = torch.empty(rows, device="cuda")
    kept = logits.clone()
    arguments = (logits, targets, weights, nll)
    kernel.nll_and_gradient_(*arguments, ignored=IGNORED, with_gradient=False)
    assert torch.equal(logits, kept)
    torch.testing.assert_close(nll.double(), right.detach(), rtol=1e-5, atol=1e-5)
    kernel.nll_and_gradient_(*arguments, ignored=IGNORED, with_gradient=True)
    torch.testing.assert_close(nll.double(), right.detach(), rtol=1e-5, atol=1e-5)
    assert error(logits, right_grad) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert (logits[5] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("target", [37, -1])
def test_a_target_that_is_no_word_makes_the_loss_nan(target: int) -> None:
    hidden, head, targets, weights = cuda_problem(5, 37, torch.bfloat16)
    targets[1] = target
    total, nll = linear_cross_entropy(hidden, head, targets, weights)
    assert total.isnan() and nll.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0, 1, 5, 4096 * 1024 + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_by_a_number_on_the_device(size: int, dtype: torch.dtype) -> None:
    from whalefall.kernels import cross_entropy as kernel

    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(size, device="cuda", generator=generator).to(dtype)
    for factor in (1.0, -2.5, 0.0, float("nan")):
        scaled = x.clone()
        kernel.scale_(scaled, torch.tensor(factor, device="cuda"))
        torch.testing.assert_close(scaled, x * factor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS_CUDA", 5 * 1000)
    inputs = cuda_problem(13, 1000, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*inputs)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
