"""The update in chunks, and as one kernel, against its definition; the norm over all gradients."""

import pytest
import torch
from torch import Tensor

from whalefall.ops import adamw
from whalefall.ops.adamw import adamw_, global_norm, reference
from whalefall.ops.halves import join, split

SETTINGS = {"learning_rate": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16 = torch.float32, torch.bfloat16
TYPES = [
    (FP32, FP32, FP32),  # weights, gradients, moments
    (FP32, FP32, BF16),
    (FP32, BF16, BF16),
    (BF16, BF16, BF16),
    (BF16, FP32, FP32),
]
SHAPES = [(3, 5, 2), (4,), (16, 3)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def error(own: Tensor, right: Tensor) -> float:
    right = right.double()
    return float((own.double() - right).norm() / right.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("weight_dtype", "gradient_dtype", "moment_dtype"), TYPES)
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_equals_the_definition(
    weight_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    moment_dtype: torch.dtype,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    weights = [randn(shape, i, weight_dtype) for i, shape in enumerate(SHAPES)]
    moments = [[torch.zeros(shape, dtype=moment_dtype) for shape in SHAPES] for _ in range(2)]
    expected = [weight.clone() for weight in weights]
    expected_moments = [[moment.clone() for moment in kind] for kind in moments]
    for step in range(1, 6):
        gradients = [randn(shape, 10 * step + i, gradient_dtype) for i, shape in enumerate(SHAPES)]
        for i, gradient in enumerate(gradients):
            first, second = expected_moments[0][i], expected_moments[1][i]
            reference(expected[i], gradient.float() / 4, first, second, step=step, **SETTINGS)
        adamw_(
            weights, [None] * 3, gradients, *moments,
            step=step, gradient_divisor=torch.tensor(4.0), **SETTINGS,
        )  # fmt: skip
    # A number on the edge between two of BF16 may round either way: one part in 256.
    tolerance = 1e-5 if weight_dtype == moment_dtype == FP32 else 1e-2
    for ours, theirs in zip([*weights, *moments[0], *moments[1]],
                            [*expected, *expected_moments[0], *expected_moments[1]],
                            strict=True):  # fmt: skip
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient_dtype", [FP32, BF16])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_a_weight_and_its_remainder_are_updated_as_the_fp32_number_they_make(
    device: str, gradient_dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; of steps most of which BF16 alone would not see."""
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    wide = [randn(shape, i, FP32, device) for i, shape in enumerate([*SHAPES, (3000,)])]
    halves = [split(weight) for weight in wide]
    rounded, remainders = (list(half) for half in zip(*halves, strict=True))
    moments = [[torch.zeros_like(w, dtype=BF16) for w in wide] for _ in range(4)]
    settings = SETTINGS | {"learning_rate": 1e-4}
    for step in range(1, 9):
        gradients = [randn(w.shape, 10 * step, gradient_dtype, device) for w in wide]
        for weights, beside, first, second in (
            (wide, [None] * len(wide), *moments[:2]),
            (rounded, remainders, *moments[2:]),
        ):
            adamw_(
                weights, beside, [gradient.clone() for gradient in gradients], first, second,
                step=step, gradient_divisor=torch.tensor(4.0, device=device), **settings,
            )  # fmt: skip
        for weight, upper, lower in zip(wide, rounded, remainders, strict=True):
            assert torch.equal(join(upper, lower), weight)
            assert torch.equal(upper, split(weight)[0])


def test_the_definition_is_adamw() -> None:
    """Of PyTorch, in float64."""
    weight = torch.nn.Parameter(randn((4, 3), 0, torch.float64))
    own, first, second = weight.detach().clone(), *torch.zeros(2, 4, 3, dtype=torch.float64)
    theirs = torch.optim.AdamW([weight], lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        weight.grad = randn((4, 3), step, torch.float64)
        reference(own, weight.grad, first, second, step=step, **SETTINGS)
        theirs.step()
    torch.testing.assert_close(own, weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_divisor_that_is_not_finite_changes_nothing(bad: float) -> None:
    tensors = [[randn((3, 2), i, BF16)] for i in range(5)]
    tensors[1] = [torch.ones(3, 2, dtype=torch.int16)]
    before = [kind[0].clone() for kind in tensors]
    adamw_(*tensors, step=1, gradient_divisor=torch.tensor(bad), **SETTINGS)
    assert all(torch.equal(kind[0], old) for kind, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtypes", [[FP32], [BF16], [BF16, FP32, BF16]])
def test_the_norm_is_of_all_numbers_in_fp32(dtypes: list[torch.dtype]) -> None:
    tensors = [randn((50, 7), i, dtype) for i, dtype in enumerate(dtypes)]
    norm = global_norm(tensors)
    right = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    assert norm.dtype == FP32 and norm.shape == ()
    torch.testing.assert_close(norm.double(), right, rtol=1e-6, atol=0)
    tensors[-1][3, 3] = float("inf")
    assert not global_norm(tensors).isfinite()


def test_the_norm_of_nothing_is_zero() -> None:
    assert global_norm([]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("weight_dtype", "gradient_dtype", "moment_dtype"), TYPES)
@pytest.mark.parametrize("size", [0, 1, 5, 1024, 100_003], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_cuda_equals_the_definition(
    weight_dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    moment_dtype: torch.dtype,
    size: int,
    scale: float,
) -> None:
    weight = randn((size,), 0, weight_dtype, "cuda")
    gradient = (scale * randn((size,), 1, FP32, "cuda")).to(gradient_dtype)
    gradient[::3] = 0
    first = (scale * randn((size,), 2, FP32, "cuda")).to(moment_dtype)
    second = (scale * randn((size,), 3, FP32, "cuda")).square().to(moment_dtype)
    tensors = (weight, gradient, first, second)
    before = gradient.clone()
    right = [tensor.double() for tensor in tensors]
    reference(right[0], right[1] / 4, *right[2:], step=3, **SETTINGS)
    divisor = torch.tensor(4.0, device="cuda")
    adamw_(
        [weight], [None], [gradient], [first], [second],
        step=3, gradient_divisor=divisor, **SETTINGS,
    )  # fmt: skip
    for own, expected in zip((weight, first, second), (right[0], *right[2:]), strict=True):
        # Half a step of BF16 is at most 1/256 of a number.
        assert error(own, expected) < (2e-6 if own.dtype == FP32 else 4e-3)
    assert torch.equal(gradient, before)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_cuda_writes_nothing_where_the_divisor_is_not_finite(bad: float) -> None:
    tensors = [[randn((3000,), i, BF16, "cuda")] for i in range(5)]
    tensors[1] = [torch.ones(3000, dtype=torch.int16, device="cuda")]
    before = [kind[0].clone() for kind in tensors]
    adamw_(*tensors, step=1, gradient_divisor=torch.tensor(bad, device="cuda"), **SETTINGS)
    assert all(torch.equal(kind[0], old) for kind, old in zip(tensors, before, strict=True))


@pytest.mark.gpu
def test_the_norm_on_cuda() -> None:
    sizes = [1, 0, 77, 2**13, 2**13 + 1, 1_000_003]
    tensors = [randn((size,), i, FP32 if i % 2 else BF16, "cuda") for i, size in enumerate(sizes)]
    tensors.append(randn((60, 50), 9, BF16, "cuda").T)
    norm = global_norm(tensors)
    right = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    assert norm.dtype == FP32 and norm.shape == ()
    torch.testing.assert_close(norm.double(), right, rtol=1e-6, atol=0)
    assert all(torch.equal(global_norm(tensors), norm) for _ in range(3))
    for bad in (float("nan"), float("inf")):
        tensors[5][1_000_002] = bad
        assert not global_norm(tensors).isfinite()
