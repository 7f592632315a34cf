"""Products by oneDNN: those of the definition, and only where it is the faster library."""

from typing import Any

import pytest
import torch
from torch import Tensor

from whalefall.ops import onednn
from whalefall.ops.linear import linear
from whalefall.ops.onednn import product, suits

pytestmark = pytest.mark.skipif(not onednn._IS_THERE, reason="torch has no oneDNN here")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of products that oneDNN made."""
    results: list[Tensor] = []
    library = torch.ops.mkldnn._linear_pointwise

    class Spy:
        @staticmethod
        def _linear_pointwise(*inputs: Any) -> Tensor:
            results.append(library(*inputs))
            return results[-1]

    monkeypatch.setattr(torch.ops, "mkldnn", Spy)
    return results


@pytest.mark.parametrize("shape", [(256, 512), (2, 200, 333), (400, 270)])
@pytest.mark.parametrize("out", [320, 500])
@pytest.mark.parametrize("turned", [False, True])
def test_is_the_product(
    taken: list[Tensor], shape: tuple[int, ...], out: int, turned: bool
) -> None:
    x = torch.randn(*shape)
    weight = torch.randn(shape[-1], out).T if turned else torch.randn(out, shape[-1])
    found = product(x, weight)
    assert found is taken[0]
    right = x.double() @ weight.double().T
    assert (found - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("shape", [(300, 512), (3, 128, 512)])
def test_a_linear_layer_in_training_has_three_products_of_which_it_makes_two(
    taken: list[Tensor], shape: tuple[int, ...]
) -> None:
    leaves = [torch.randn(*shape), torch.randn(320, 512)]
    x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    grad = torch.randn(*shape[:-1], 320)
    out, right = linear(x, weight), wide[0] @ wide[1].T
    out.backward(grad)
    right.backward(grad.double())
    assert len(taken) == 2
    for own, other in ((out, right), (x.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert (own - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(
    "x",
    [torch.randn(512, 300).T, torch.randn(300, 1024)[:, ::2], torch.randn(1, 512).expand(300, 512)],
    ids=["turned", "every other number", "one row again and again"],
)
def test_rows_may_lie_anyhow(taken: list[Tensor], x: Tensor) -> None:
    weight = torch.randn(320, 512)
    right = x.double() @ weight.double().T
    assert (product(x, weight) - right).norm() <= 1e-6 * right.norm()
    assert len(taken) == 1


def test_a_frozen_weight_or_input_gets_no_gradient(taken: list[Tensor]) -> None:
    x, weight = torch.randn(300, 512), torch.randn(320, 512, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None and len(taken) == 1
    x.requires_grad_()
    linear(x, weight.detach()).sum().backward()
    assert x.grad is not None and len(taken) == 3


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.randn(255, 512), 512),
        (torch.randn(2048, 64), 64),
        (torch.randn(300, 512, dtype=torch.float64), 320),
        (torch.randn(0, 512), 512),
    ],
    ids=["few rows", "little to do", "another type", "none"],
)
def test_others_are_left_to_torch(taken: list[Tensor], x: Tensor, out: int) -> None:
    weight = torch.randn(out, x.shape[1], dtype=x.dtype)
    assert not suits(x, weight)
    assert torch.equal(product(x, weight), x @ weight.T)
    assert not taken


def test_without_the_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_IS_THERE", False)
    x, weight = torch.randn(300, 512), torch.randn(320, 512)
    assert torch.equal(product(x, weight), x @ weight.T)
