"""SwiGLU, its written-out backward and its FP8 forms against the definition in float64."""

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from whalefall.ops.quantize import (
    Tiles,
    dequantize,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)
from whalefall.ops.swiglu import reference, swiglu, swiglu_backward_tiles, swiglu_tiles

GROUPS = [None, [130, 0, 128, 5], [0, 0, 300], [0, 0], [1] * 20]


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(rows: int, weighted: bool) -> None:
    gate_up = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(rows, dtype=torch.float64, requires_grad=True) if weighted else None
    torch.testing.assert_close(swiglu(gate_up, weights), reference(gate_up, weights))
    if rows:
        inputs = (gate_up,) if weights is None else (gate_up, weights)
        assert torch.autograd.gradcheck(swiglu, inputs)


def test_by_hand() -> None:
    # silu(0) = 0; silu(2) = 2 / (1 + e^-2) = 1.7616.
    out = swiglu(torch.tensor([[0.0, 2.0, 5.0, 3.0]]), torch.tensor([0.5]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 1.7616 * 3.0 * 0.5]]), rtol=1e-4, atol=0.0)


def test_nothing_but_the_projection_is_kept() -> None:
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.shape), x)[1], lambda x: x
    ):
        swiglu(torch.randn(6, 8, requires_grad=True), torch.rand(6, requires_grad=True))
    assert kept == [torch.Size([6, 8]), torch.Size([6])]


@pytest.mark.parametrize("inner", [48, 128, 200])
def test_output_in_tiles(inner: int) -> None:
    gate_up, weights, _ = problem(37, inner)
    tiles, kept = swiglu_tiles(gate_up, weights, keep=False)
    assert tiles.scales.shape == (-(-inner // 128), 37) and kept is None
    assert error(dequantize(tiles), reference(gate_up.double(), weights.double())) < 0.04


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_kept_changes_no_output(power_of_two: bool) -> None:
    gate_up, weights, _ = problem(37, 128)
    how = {"power_of_two": power_of_two}
    tiles, kept = swiglu_tiles(gate_up, weights, keep=True, **how)
    assert_same(tiles, swiglu_tiles(gate_up, weights, keep=False, **how)[0])
    assert kept is not None
    assert_same(kept, quantize_tiles(gate_up, **how))


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_backward_in_tiles(sizes: list[int] | None, weighted: bool) -> None:
    """Against float64 gradients, with each group's rows looked up one by one in the transposes."""
    rows = 200 if sizes is None else sum(sizes)
    gate_up, weights, grad = problem(rows, 128)
    kept, ends = quantize_tiles(gate_up), None if sizes is None else ends_of(sizes)
    straight, turned, out, grad_weights = swiglu_backward_tiles(
        grad, kept, weights if weighted else None, ends
    )
    gate_up = dequantize(kept, torch.float64)
    right, right_gate_up, right_weights = gradients(gate_up, weights if weighted else None, grad)
    at = torch.tensor(padded_rows(sizes or [rows]), dtype=torch.long)
    assert error(dequantize(straight), right_gate_up) < 0.04
    assert error(dequantize(turned)[:, at].T, right_gate_up) < 0.04
    assert error(dequantize(out)[:, at].T, right) < 0.04
    padding = torch.ones(out.values.shape[1], dtype=torch.bool).index_fill(0, at, False)
    assert (dequantize(turned)[:, padding] == 0).all()
    assert (dequantize(out)[:, padding] == 0).all()
    if right_weights is None:
        assert grad_weights is None
    else:
        assert grad_weights is not None and error(grad_weights, right_weights) < 1e-5


def test_scales_may_be_powers_of_two() -> None:
    gate_up, weights, grad = problem(130, 128)
    made, kept = swiglu_tiles(gate_up, weights, keep=True, power_of_two=True)
    assert kept is not None
    *tiles, _ = swiglu_backward_tiles(grad, kept, weights, power_of_two=True)
    for one in (*tiles, made, kept):
        assert (one.scales.log2() % 1 == 0).all()


def test_no_tile_spans_gate_and_up() -> None:
    gate_up, weights, grad = problem(3, 192)
    message = r"moe_intermediate_size .* 128 .* 192"
    with pytest.raises(ValueError, match=message):
        swiglu_tiles(gate_up, weights, keep=True)
    with pytest.raises(ValueError, match=message):
        swiglu_backward_tiles(grad, quantize_tiles(gate_up), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner"), [(0, 128), (1, 8), (17, 1408), (40, 130), (131, 300), (33, 2816)]
)
def test_cuda_agrees(rows: int, inner: int, weighted: bool, dtype: torch.dtype) -> None:
    gate_up, weights, grad = (x.cuda() for x in problem(rows, inner))
    for kind in (ordinary, skewed, extreme):
        x, outer = kind(gate_up).to(dtype).requires_grad_(), kind(grad).to(dtype)
        inputs = (x, weights.requires_grad_()) if weighted else (x,)
        out = swiglu(*inputs)
        right, *right_grads = gradients(x, weights if weighted else None, outer)
        bound = 3e-3 if dtype == torch.bfloat16 else 1e-6
        assert out.dtype == dtype and error(out, right) < bound
        for own, exact in zip(torch.autograd.grad(out, inputs, outer), right_grads, strict=False):
            assert error(own, exact) < bound


@pytest.mark.gpu
def test_cuda_takes_any_memory_layout() -> None:
    gate_up, weights, grad = (x.cuda().bfloat16() for x in problem(24, 128))
    inputs = (gate_up.T.contiguous().T, torch.stack([weights, weights], 1)[:, 0])
    assert torch.equal(swiglu(*inputs), swiglu(gate_up, weights))
    made, kept = swiglu_tiles(*inputs, keep=True)
    right, right_kept = swiglu_tiles(gate_up, weights, keep=True)
    one = swiglu_backward_tiles(grad.T.contiguous().T, kept, inputs[1])
    other = swiglu_backward_tiles(grad, right_kept, weights)
    for a, b in zip((made, kept, *one[:3]), (right, right_kept, *other[:3]), strict=True):
        assert_same(a, b)
    assert torch.equal(one[3], other[3])


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_cuda_tiles_are_those_of_the_parts(
    sizes: list[int] | None, dtype: torch.dtype, weighted: bool, power_of_two: bool
) -> None:
    """The same numbers as SwiGLU and then ``quantize``; backward, SwiGLU of what was kept.

    Backward, BF16 that is halfway between two numbers of FP8 may become either.
    """
    halfway = dtype == torch.bfloat16 and not power_of_two
    rows = 200 if sizes is None else sum(sizes)
    ends = None if sizes is None else ends_of(sizes).cuda()
    gate_up, all_weights, grad = (x.cuda() for x in problem(rows, 1152))
    weights, how = all_weights if weighted else None, {"power_of_two": power_of_two}
    for kind in (ordinary, skewed, extreme):
        x, outer = kind(gate_up).to(dtype), kind(grad).to(dtype)
        out, kept = swiglu_tiles(x, weights, keep=True, **how)
        assert_same(out, quantize_tiles(swiglu(x, weights), **how))
        assert_same(out, swiglu_tiles(x, weights, keep=False, **how)[0])
        assert kept is not None
        assert_same(kept, quantize_tiles(x, **how))

        *tiles, own_weights = swiglu_backward_tiles(outer, kept, weights, ends, **how)
        inputs = [y.requires_grad_() for y in (dequantize(kept), weights) if y is not None]
        wide = swiglu(*inputs)
        grad_x, *grad_weights = torch.autograd.grad(wide, inputs, outer.float())
        expected = (
            *quantize_both(grad_x.to(dtype), ends, **how),
            quantize_transposed(wide.detach().to(dtype), ends, **how),
        )
        for one, other in zip(tiles, expected, strict=True):
            assert_same(one, other, halfway)
        for exact in grad_weights:
            assert error(own_weights, exact) < 1e-6
        if weights is not None:
            weights = weights.detach()


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
def test_cuda_divides_as_division_does(power_of_two: bool) -> None:
    """Every BF16 number from 2^-21 to 1 in tiles of every amax, halfway between FP8's included."""
    numbers = torch.arange(0x3F80 - 22 * 127, 0x3F80, dtype=torch.int16).view(torch.bfloat16)
    largest = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    tiles = numbers.view(22, 127).repeat(128, 1)
    gate = torch.cat([tiles, largest.repeat_interleave(22)[:, None]], 1)
    gate_up, how = torch.cat([gate, -gate], 1), {"power_of_two": power_of_two}
    _, own = swiglu_tiles(gate_up.cuda(), keep=True, **how)
    assert own is not None
    assert_same(Tiles(own.values.cpu(), own.scales.cpu()), quantize_tiles(gate_up, **how))


@pytest.mark.gpu
def test_cuda_leaves_rows_of_nobody_alone() -> None:
    """Whatever is in the rows after the last group, no group sees it."""
    gate_up, weights, grad = (x.cuda() for x in problem(300, 640))
    ends = ends_of([100, 0, 29]).cuda()
    outs = []
    for filling in (0.0, float("nan")):
        x, outer = gate_up.bfloat16(), grad.bfloat16()
        x[129:], outer[129:] = filling, filling
        kept = quantize_tiles(x)
        straight, turned, out, grad_weights = swiglu_backward_tiles(outer, kept, weights, ends)
        outs.append((straight.values[:129], straight.scales[:, :129], *astuple(turned)))
        outs[-1] += (*astuple(out), grad_weights[:129])
        assert not out.values.float().isnan().any() and not turned.values.float().isnan().any()
    for one, other in zip(*outs, strict=True):
        assert torch.equal(one.float(), other.float())


def problem(rows: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + inner)
    gate_up = torch.randn(rows, 2 * inner, generator=generator)
    weights = torch.rand(rows, generator=generator)
    return gate_up, weights, torch.randn(rows, inner, generator=generator)


def ordinary(x: Tensor) -> Tensor:
    return x.clone()


def skewed(x: Tensor) -> Tensor:
    """Columns of very different size."""
    return x * torch.linspace(-6, 3, x.shape[1], device=x.device).exp()


def extreme(x: Tensor) -> Tensor:
    """Outliers of 1e4 among ordinary numbers, and rows of zeros."""
    x = torch.where(x.abs() > 3.0, x * 1e4, x)
    x[::3] = 0.0
    return x


def gradients(
    gate_up: Tensor, weights: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, gradients of gate_up and weights, in float64."""
    inputs = [x.detach().double().requires_grad_() for x in (gate_up, weights) if x is not None]
    out = reference(*inputs)
    grads = torch.autograd.grad(out, inputs, grad.double())
    return out.detach(), grads[0], grads[1] if weights is not None else None


def error(own: Tensor, right: Tensor) -> float:
    """||own - right|| / ||right||, 0 for nothing of nothing."""
    return float((own.double() - right).norm() / right.norm().clamp_min(1e-30))


def assert_same(one: Tiles, other: Tiles, halfway: bool = False) -> None:
    """The same bits, but for the sign of a zero; or for a few neighbours where ``halfway``."""
    assert torch.equal(one.scales, other.scales)
    differ = one.values.float() != other.values.float()
    if not halfway:
        assert not differ.any()
    elif differ.any():
        steps = one.values.view(torch.int8).int() - other.values.view(torch.int8).int()
        assert (steps[differ].abs() == 1).all() and differ.float().mean() < 0.01


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def padded_rows(sizes: list[int]) -> list[int]:
    """The column of each row in transposed tiles."""
    columns, start = [], 0
    for size in sizes:
        columns += range(start, start + size)
        start += -(-size // 128) * 128
    return columns
