"""Sums of squares that lie with a gradient: how long they hold, and those of the experts."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from whalefall.config.train import OptimizerConfig
from whalefall.ops.adamw import global_norm
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.grouped_gemm import grouped_gemm_wgrad
from whalefall.ops.grouped_linear import grouped_linear, grouped_weight_gradient
from whalefall.ops.quantize import quantize_transposed
from whalefall.ops.squares import keep_squares, kept_squares
from whalefall.train.optimizer import AdamW

SHAPE = (4, 6)
SUMS = torch.tensor([2.0, 7.0])
"""Not those of any tensor here, so that a norm of 3 shows that they were believed."""


def with_sums() -> Tensor:
    x = torch.ones(SHAPE, dtype=torch.bfloat16)
    keep_squares(x, SUMS)
    return x


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x,
        lambda x: x.detach(),
        lambda x: x.view(2, -1),
        lambda x: x.chunk(1)[0],
        lambda x: x.split([len(x)])[0],
    ],
)
def test_they_stand_for_the_same_numbers(way: Callable[[Tensor], Tensor]) -> None:
    x = way(with_sums())
    gc.collect()  # the tensor that they were left with
    assert kept_squares(x) is SUMS
    assert global_norm([x]) == 3
    assert global_norm([x, torch.ones(16)]) == 5


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x[1:],
        lambda x: x[:1].expand(x.shape),  # as many, but not each once
        lambda x: x.T,
        lambda x: x.clone(),
        lambda x: x.float(),
        lambda x: x.view(torch.float16),
    ],
)
def test_they_do_not_stand_for_others(way: Callable[[Tensor], Tensor]) -> None:
    x = way(with_sums())
    assert kept_squares(x) is None
    torch.testing.assert_close(global_norm([x]), x.float().norm())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.detach()[1:].zero_(),
        lambda x: torch.add(x, x, out=x),
        lambda x: torch._foreach_mul_([x], 2.0),
        lambda x: torch.autograd.graph.increment_version(x),
    ],
)
def test_they_end_with_a_change(change: Callable[[Tensor], object]) -> None:
    x = with_sums()
    change(x)
    assert kept_squares(x) is None
    torch.testing.assert_close(global_norm([x]), x.float().norm())


def test_they_go_with_the_tensor() -> None:
    x, sums = torch.ones(SHAPE), torch.ones(1)
    keep_squares(x, sums)
    last, gone = x.view(-1), weakref.ref(sums)
    del x, sums
    assert gone() is not None
    del last
    assert gone() is None


class Product(torch.autograd.Function):
    """Gives its weight a gradient of ones, as the only chunk of what it made."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return with_sums().chunk(1)[0]


@pytest.mark.parametrize("passes", [1, 2])
def test_they_reach_the_optimizer_while_there_is_one_gradient(passes: int) -> None:
    weight = nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", weight)], OptimizerConfig())
    for _ in range(passes):
        Product.apply(weight).backward()
    norm = optimizer.step(1e-3)
    assert norm.item() == pytest.approx(3 if passes == 1 else 2 * 24**0.5)


def test_a_second_gradient_added_in_place_ends_them() -> None:
    weight = nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16))
    Product.apply(weight).backward()
    assert kept_squares(weight.grad) is SUMS
    Product.apply(weight).backward()
    assert kept_squares(weight.grad) is None


CUDA_SIZES = [
    [300, 0, 513, 1],
    [0, 140, 0, 20, 0],  # empty groups at both ends and between
    [7] * 40,
    [0, 0, 0],
]
CUDA_SHAPES = [(1408, 2816), (144, 80), (272, 400), (400, 640), (16, 16)]
"""Of a weight: tiles that are whole, tall, cut off below, to the right, and with an empty half."""
NOBODYS = 3
"""Rows after the last group's."""


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CUDA_SIZES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), CUDA_SHAPES)
def test_those_of_the_experts_in_fp8(sizes: list[int], rows: int, cols: int) -> None:
    spoil_memory()
    (grad, x), ends = cuda_problem(sizes, rows, cols)
    a, b = quantize_transposed(grad, ends), quantize_transposed(x, ends)
    spoil_memory()
    agrees(lambda: grouped_gemm_wgrad(a, b, ends))
    agrees(lambda: grouped_gemm_wgrad(a, b, ends, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", CUDA_SIZES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [*CUDA_SHAPES, (72, 136), (136, 72), (8, 8)])
def test_those_of_the_experts_in_bf16(sizes: list[int], rows: int, cols: int) -> None:
    (grad, x), ends = cuda_problem(sizes, rows, cols)
    spoil_memory()
    agrees(lambda: grouped_weight_gradient(grad, x, ends))


@pytest.mark.gpu
def test_those_of_many_tiles_of_a_program() -> None:
    """What tiles leave in shared memory, and where they leave their sums."""
    sizes = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for rows, cols in ((2816, 2048), (1424, 1168)):
        test_those_of_the_experts_in_fp8(sizes, rows, cols)
        test_those_of_the_experts_in_bf16(sizes, rows, cols)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, Recipe(True, True, True)])
def test_those_of_the_experts_reach_the_parameter(recipe: Recipe | None) -> None:
    (_, x), ends = cuda_problem([300, 0, 513, 1], 256, 384)
    weight = nn.Parameter(torch.randn(4, 256, 384, device="cuda", dtype=torch.bfloat16))
    if recipe is None:
        out = grouped_linear(x, weight, ends)
    else:
        out = fp8_linear(x, [weight], WeightCast(), recipe, ends)
    out.backward(torch.randn_like(out))
    assert weight.grad is not None and kept_squares(weight.grad) is not None
    norm = global_norm([weight.grad])
    torch.testing.assert_close(norm, global_norm([weight.grad.clone()]), rtol=1e-5, atol=0)


def cuda_problem(sizes: list[int], *features: int) -> tuple[list[Tensor], Tensor]:
    """Rows with so many features each, those of nobody NaN, and the groups' ends."""
    generator = torch.Generator("cuda").manual_seed(sum(sizes))
    tokens = sum(sizes) + NOBODYS
    values = [torch.randn(tokens, n, device="cuda", generator=generator) for n in features]
    values = [value.bfloat16() for value in values]
    for value in values:
        value[-NOBODYS:] = torch.nan
    return values, torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)


def spoil_memory() -> None:
    """Makes what is allocated next begin as NaN: a sum of what nobody wrote would show."""
    blocks = [torch.full((size,), torch.nan, device="cuda") for size in [2**26] + 64 * [2**17]]
    del blocks


def agrees(product: Callable[[], Tensor]) -> None:
    """The sums with the numbers as stored, rounded, and with the sums of another run."""
    gradient = product()
    sums, again = kept_squares(gradient), kept_squares(product())
    assert sums is not None and again is not None and sums.dtype == torch.float32
    right = gradient.double().square().sum()
    # BF16 is off by 1e-3, either way, and twice that when squared: a sum of many is off by less.
    bound = 1e-5 + 2.5e-2 / max(1, gradient.count_nonzero().item()) ** 0.5
    torch.testing.assert_close(sums.double().sum(), right, rtol=bound, atol=0)
    assert torch.equal(sums, again)
