"""FP8 products against the float64 products of the same quantized operands."""

from itertools import product as combinations

import pytest
import torch
from torch import Tensor

from whalefall.ops import fp8_linear as module
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.quantize import dequantize, quantize_blocks, quantize_tiles, quantize_transposed

ALL = Recipe(fprop=True, dgrad=True, wgrad=True)
ENDS = torch.tensor([130, 130, 131, 300], dtype=torch.int32)
"""Groups of 130, 0, 1 and 169 rows."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose size differs from row to row and column to column, as activations' does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    scales = torch.randn(shape[-1], generator=generator).exp()
    return x * scales


def run(x: Tensor, weight: Tensor, recipe: Recipe, ends: Tensor | None) -> tuple[Tensor, ...]:
    """Output, and gradients of x and weight."""
    x, weight = (tensor.clone().requires_grad_() for tensor in (x, weight))
    out = fp8_linear(x, [weight], WeightCast(), recipe, ends)
    out.backward(random(*out.shape, seed=9))
    assert x.grad is not None and weight.grad is not None
    return out.detach(), x.grad, weight.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def wide(quantized: object) -> Tensor:
    return dequantize(quantized, torch.float64)


def test_a_dense_layer_is_the_product_of_its_quantized_operands() -> None:
    x, weight = random(200, 272), random(144, 272, seed=1)
    out, grad_x, grad_weight = run(x, weight, ALL, None)
    grad = random(200, 144, seed=9)
    blocks = wide(quantize_blocks(weight))
    assert relative(out, wide(quantize_tiles(x)) @ blocks.T) < 1e-6
    assert relative(grad_x, wide(quantize_tiles(grad)) @ blocks) < 1e-6
    columns = wide(quantize_transposed(grad)) @ wide(quantize_transposed(x)).T
    assert relative(grad_weight, columns) < 1e-6


def test_what_fp8_costs() -> None:
    """Two operands of 3 mantissa bits: about 2^-4 / sqrt(3) each, independent over the sum."""
    x, weight = random(256, 512), random(256, 512, seed=1)
    out, grad_x, grad_weight = run(x, weight, ALL, None)
    grad = random(256, 256, seed=9)
    exact = (x @ weight.T, grad @ weight, grad.T @ x)
    for found, expected in zip((out, grad_x, grad_weight), exact, strict=True):
        assert 0.01 < relative(found, expected) < 0.05


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("choice", list(combinations((False, True), repeat=3)))
def test_each_product_is_chosen_apart(choice: tuple[bool, bool, bool], grouped: bool) -> None:
    ends = ENDS if grouped else None
    x, weight = random(300, 64), random(*((4, 48, 64) if grouped else (48, 64)), seed=1)
    plain = run(x, weight, Recipe(False, False, False), ends)
    quantized = run(x, weight, ALL, ends)
    mixed = run(x, weight, Recipe(*choice), ends)
    for found, in_fp8, in_working_type, is_fp8 in zip(mixed, quantized, plain, choice, strict=True):
        assert torch.equal(found, in_fp8 if is_fp8 else in_working_type)
        assert not torch.equal(in_fp8, in_working_type)


def test_a_group_is_a_dense_layer_of_its_rows() -> None:
    x, weight = random(300, 80), random(4, 32, 80, seed=1)
    out, grad_x, grad_weight = run(x, weight, ALL, ENDS)
    grads, start = random(300, 32, seed=9), 0
    for group, end in enumerate(ENDS.tolist()):
        rows = slice(start, end)
        start = end
        if rows.start == rows.stop:
            assert not grad_weight[group].any()
            continue
        part, w = x[rows].clone().requires_grad_(), weight[group].clone().requires_grad_()
        alone = fp8_linear(part, [w], WeightCast(), ALL)
        alone.backward(grads[rows])
        torch.testing.assert_close(out[rows], alone.detach())
        torch.testing.assert_close(grad_x[rows], part.grad)
        torch.testing.assert_close(grad_weight[group], w.grad)


def test_a_weight_is_cast_again_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    original = module.quantize_blocks_both
    monkeypatch.setattr(module, "quantize_blocks_both", counted)
    weight, cast = torch.nn.Parameter(random(32, 32)), WeightCast()
    for _ in range(3):
        before = fp8_linear(random(4, 32), [weight], cast, ALL)
        before.sum().backward()
    assert calls == 1
    with torch.no_grad():
        weight.mul_(2)
    after = fp8_linear(random(4, 32), [weight], cast, ALL)
    assert calls == 2
    torch.testing.assert_close(after, 2 * before)
    fp8_linear(random(4, 32), [weight], cast, Recipe(True, True, True, power_of_two=True))
    assert calls == 3
    fp8_linear(random(4, 32), [weight], WeightCast(), Recipe(False, False, True)).sum().backward()
    assert calls == 3  # no product reads the weight in FP8


@pytest.mark.parametrize("recipe", [ALL, Recipe(False, True, False), Recipe(True, False, True)])
def test_several_weights_are_one(recipe: Recipe) -> None:
    """Of sizes that fill their blocks, so that no block has rows of both."""
    parts, x = [random(128, 64, seed=1), random(48, 64, seed=2)], random(20, 64)
    apart, together = ([w.clone().requires_grad_() for w in parts] for _ in range(2))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    separate = torch.cat([fp8_linear(xs[0], [w], WeightCast(), recipe) for w in apart], 1)
    joint = fp8_linear(xs[1], together, WeightCast(), recipe)
    torch.testing.assert_close(joint, separate)
    for out in (separate, joint):
        out.backward(random(20, 176, seed=9))
    for a, b in zip((*apart, xs[0]), (*together, xs[1]), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)


def test_power_of_two_scales_are_used() -> None:
    x, weight = random(32, 64), random(16, 64, seed=1)
    plain, rounded = (
        fp8_linear(x, [weight], WeightCast(), Recipe(True, True, True, power_of_two))
        for power_of_two in (False, True)
    )
    assert not torch.equal(plain, rounded)
    assert relative(rounded, plain) < 0.05
