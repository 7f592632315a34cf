"""SwiGLU and its written-out backward against the definition in float64."""

import pytest
import torch

from whalefall.ops.swiglu import reference, swiglu


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
