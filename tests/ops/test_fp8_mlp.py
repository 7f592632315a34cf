"""SwiGLU in FP8 against its parts: the two products, SwiGLU between them, what moves tokens."""

import pytest
import torch
from torch import Tensor

from whalefall.ops import fp8_mlp as module
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.fp8_mlp import fp8_experts, fp8_mlp, suits_fp8_mlp
from whalefall.ops.permute import permute, unpermute
from whalefall.ops.quantize import dequantize, quantize_tiles
from whalefall.ops.swiglu import swiglu

TOKENS, TOP_K, HIDDEN, INNER = 150, 2, 192, 128
GROUPS = (130, 0, 1, 109)
"""Rows of each expert; those of the other 60 choices are elsewhere."""
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BOUNDS = {"cpu": 1e-5, "cuda": 0.01}
"""In BF16 two kernels' last bits differ now and then, which may be another number of FP8."""

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
recipes = pytest.mark.parametrize(
    "recipe", [Recipe(True, True, True, power_of_two) for power_of_two in (False, True)]
)


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Numbers whose size differs from column to column, as activations' does."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.randn(shape[-1], generator=generator).exp()
    return x.to(device, DTYPES[device])


def table(device: str = "cpu", spare: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``places``, ``row_tokens`` with rows of nobody, and ``ends``."""
    choices, ends = TOKENS * TOP_K, torch.tensor(GROUPS).cumsum(0)
    order = torch.randperm(choices, generator=torch.Generator().manual_seed(3))[: sum(GROUPS)]
    places = torch.full((choices,), -1).index_put((order,), torch.arange(len(order)))
    row_tokens = torch.cat([order // TOP_K, order.new_zeros(spare)])
    places, row_tokens, ends = places.view(TOKENS, TOP_K), row_tokens.int(), ends.int()
    return places.to(device), row_tokens.to(device), ends.to(device)


def casts() -> tuple[WeightCast, WeightCast]:
    return WeightCast(), WeightCast()


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def by_parts(
    x: Tensor,
    gate_up: list[Tensor],
    down: Tensor,
    recipe: Recipe,
    weights: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Their output, and another for the gradients: SwiGLU's input is as it was kept, in FP8."""
    joint = fp8_linear(x, gate_up, WeightCast(), recipe, ends)
    kept = dequantize(quantize_tiles(joint.detach(), power_of_two=recipe.power_of_two))
    inputs = (joint, kept + (joint - joint.detach()))
    activated = [swiglu(value, weights).to(x.dtype) for value in inputs]
    exact, rounded = (fp8_linear(a, [down], WeightCast(), recipe, ends) for a in activated)
    return exact, rounded


def assert_close(own: Tensor, right: Tensor, bound: float) -> None:
    assert own.shape == right.shape and own.dtype == right.dtype
    assert (own.double() - right.double()).norm() <= bound * right.double().norm()


def assert_same(
    own: Tensor, parts: tuple[Tensor, Tensor], inputs: list[Tensor], others: list[Tensor]
) -> None:
    (exact, rounded), bound = parts, BOUNDS[own.device.type]
    assert_close(own, exact, bound)
    assert (rounded - exact).norm() >= 2 * bound * exact.norm()
    grad = random(*own.shape, seed=9, device=own.device.type)
    found = torch.autograd.grad(own, inputs, grad)
    expected = torch.autograd.grad(rounded, others, grad)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, bound)


@devices
@recipes
@pytest.mark.parametrize("spare", [0, 7], ids=["", "rows of nobody"])
def test_experts_equal_their_parts(spare: int, recipe: Recipe, device: str) -> None:
    places, row_tokens, ends = table(device, spare)
    parts = [
        random(TOKENS, HIDDEN, device=device),
        random(4, 2 * INNER, HIDDEN, seed=1, device=device),
        random(4, HIDDEN, INNER, seed=2, device=device),
        torch.rand(sum(GROUPS), device=device),
    ]
    own, composed = leaves(*parts), leaves(*parts)
    nobodys = torch.ones(spare, device=device)
    x, up, down, weights = own
    weights = torch.cat([weights, nobodys])
    out = fp8_experts(x, places, row_tokens, weights, ends, up, down, casts(), recipe)
    x, up, down, weights = composed
    weights = torch.cat([weights, nobodys])
    rows = permute(x, places, row_tokens)
    exact, rounded = (
        unpermute(rows, places, row_tokens)
        for rows in by_parts(rows, [up], down, recipe, weights, ends)
    )
    assert_same(out, (exact, rounded), own, composed)


@devices
@recipes
@pytest.mark.parametrize("tokens", [0, 150, 152])
def test_a_dense_layer_equals_its_parts(tokens: int, recipe: Recipe, device: str) -> None:
    gate, up = (random(INNER, HIDDEN, seed=seed, device=device) for seed in (1, 4))
    x, down = random(tokens, HIDDEN, device=device), random(HIDDEN, INNER, seed=2, device=device)
    own, composed = leaves(x, gate, up, down), leaves(x, gate, up, down)
    out = fp8_mlp(*own, casts(), recipe)
    x, gate, up, down = composed
    assert_same(out, by_parts(x, [gate, up], down, recipe), own, composed)


def test_frozen_weights_cost_no_products_and_a_frozen_input_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = []
    for name in ("product", "weight_product"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, name=name: products.append(name) or real(*args)
        )
    weights = random(INNER, HIDDEN, seed=1), random(INNER, HIDDEN, seed=2), random(HIDDEN, INNER)
    recipe, x = Recipe(True, True, True), random(TOKENS, HIDDEN)

    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        products.clear()
        out = fp8_mlp(*inputs, casts(), recipe)
        return torch.autograd.grad(out.sum(), [each for each in inputs if each.requires_grad])

    all_of_them = gradients(leaves(x, *weights))
    assert products.count("product") == 4 and products.count("weight_product") == 2
    (of_input,) = gradients([*leaves(x), *weights])
    assert torch.equal(of_input, all_of_them[0])
    assert products.count("product") == 4 and products.count("weight_product") == 0
    of_weights = gradients([x, *leaves(*weights)])
    assert all(torch.equal(*pair) for pair in zip(of_weights, all_of_them[1:], strict=True))
    assert products.count("product") == 3 and products.count("weight_product") == 2


@recipes
def test_without_gradients_it_is_the_same(recipe: Recipe) -> None:
    places, row_tokens, ends = table()
    x, gate, up = random(TOKENS, HIDDEN), random(INNER, HIDDEN, seed=1), random(INNER, HIDDEN)
    down, weights = random(HIDDEN, INNER, seed=2), torch.rand(len(row_tokens))
    stacked = (torch.cat([gate, up]).expand(4, -1, -1), down.expand(4, -1, -1))
    grouped = (places, row_tokens, weights, ends, *stacked)
    for operation, inputs in ((fp8_mlp, (gate, up, down)), (fp8_experts, grouped)):
        trained = operation(x.clone().requires_grad_(), *inputs, casts(), recipe)
        with torch.no_grad():
            assert torch.equal(operation(x, *inputs, casts(), recipe), trained)


def test_the_input_and_that_of_swiglu_are_kept_in_fp8_and_nothing_else() -> None:
    recipe, (places, row_tokens, ends) = Recipe(True, True, True), table()
    x, weights, up, down = leaves(
        random(TOKENS, HIDDEN),
        torch.rand(len(row_tokens)),
        random(4, 2 * INNER, HIDDEN),
        random(4, HIDDEN, INNER),
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_experts(x, places, row_tokens, weights, ends, up, down, casts(), recipe)
        fp8_mlp(x, up[0, :INNER], up[0, INNER:], down[0], casts(), recipe)
    matrices = {tuple(t.shape): t.dtype for t in kept if t.ndim > 1 and t is not places}
    rows, fp8 = len(row_tokens), torch.float8_e4m3fn
    for inputs, columns in ((rows, 128 * (rows // 128 + 4)), (TOKENS, 256)):
        assert matrices.pop((inputs, 2 * INNER)) == matrices.pop((HIDDEN, columns)) == fp8
        assert matrices.pop((2 * INNER // 128, inputs)) == torch.float32
        assert matrices.pop((columns // 128, HIDDEN)) == torch.float32
    assert not matrices


@pytest.mark.parametrize(
    ("recipe", "inner", "suits"),
    [
        (None, 128, False),
        (Recipe(True, True, False), 128, False),
        (Recipe(True, True, True), 1408, True),
        (Recipe(True, True, True), 192, False),
    ],
)
def test_what_suits(recipe: Recipe | None, inner: int, suits: bool) -> None:
    assert suits_fp8_mlp(recipe, inner) == suits
