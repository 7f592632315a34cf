"""The fused, chunked update against its definition."""

import pytest
import torch

from whalefall.ops import adamw
from whalefall.ops.adamw import adamw_, reference

SETTINGS = {"learning_rate": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("moment_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_equals_the_definition(
    moment_dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 2), (4,), (16, 3)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    moments = [[torch.zeros(shape, dtype=moment_dtype) for shape in shapes] for _ in range(2)]
    expected = [w.clone() for w in weights]
    expected_moments = [[m.clone() for m in kind] for kind in moments]
    for step in range(1, 6):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for i, gradient in enumerate(gradients):
            first, second = expected_moments[0][i], expected_moments[1][i]
            reference(expected[i], gradient / 4, first, second, step=step, **SETTINGS)
        adamw_(
            weights, gradients, *moments, step=step, gradient_divisor=torch.tensor(4.0), **SETTINGS
        )
    # A moment on the edge between two BF16 numbers may round either way: one part in 256.
    tolerance = 1e-5 if moment_dtype == torch.float32 else 1e-2
    for ours, theirs in zip([*weights, *moments[0], *moments[1]],
                            [*expected, *expected_moments[0], *expected_moments[1]],
                            strict=True):  # fmt: skip
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
