"""The routed experts, expert by expert, against their definition in float64."""

import pytest
import torch
from torch import Tensor

from whalefall.ops.looped_experts import looped_experts, reference
from whalefall.ops.permute import sort_by_expert

HIDDEN, INNER, EXPERTS = 6, 4, 5
NAMES = ("x", "weights", "gate_up", "down")


def problem(tokens: int, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What has gradients, and [places, row_tokens, ends]."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :2]
    if kind == "empty experts":
        chosen = torch.tensor([1, 3]).expand(tokens, 2).contiguous()
    places, row_tokens = sort_by_expert(chosen, EXPERTS)
    loads = chosen.flatten().bincount(minlength=EXPERTS)
    if kind == "absent":  # the last two experts are elsewhere; their rows are nobody's
        loads, places = loads[:3], places.where(chosen < 3, -1)
    elif kind == "all absent":
        loads, places = loads[:3] * 0, torch.full_like(places, -1)
    shapes = ((tokens, HIDDEN), (2 * tokens,), (len(loads), 2 * INNER, HIDDEN))
    shapes += ((len(loads), HIDDEN, INNER),)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    held = {n: v.to(dtype).requires_grad_() for n, v in zip(NAMES, values, strict=True)}
    return held, [places, row_tokens, loads.cumsum(0, dtype=torch.int32)]


def looped(held: dict[str, Tensor], sort: list[Tensor]) -> Tensor:
    x, weights, gate_up, down = (held[name] for name in NAMES)
    places, row_tokens, ends = sort
    return looped_experts(x, places, row_tokens, weights, ends, gate_up, down)


KINDS = ["all", "empty experts", "absent", "all absent"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_values_and_gradients(tokens: int, kind: str, dtype: torch.dtype) -> None:
    held, sort = problem(tokens, kind, dtype)
    exact = {name: value.detach().double().requires_grad_() for name, value in held.items()}
    own, right = looped(held, sort), reference(row_tokens=sort[1], ends=sort[2], **exact)
    outer = torch.randn(HIDDEN, tokens, dtype=torch.float64).T  # of a transpose's memory layout
    own_grads = torch.autograd.grad(own, list(held.values()), outer.to(dtype))
    right_grads = torch.autograd.grad(
        right + 0 * sum(value.sum() for value in exact.values()), list(exact.values()), outer
    )
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for one, other in zip((own, *own_grads), (right, *right_grads), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).norm() <= bound * other.norm()


def test_gradcheck() -> None:
    held, sort = problem(4, "absent", torch.float64)
    inputs = tuple(held.values())
    assert torch.autograd.gradcheck(
        lambda *values: looped(dict(zip(NAMES, values, strict=True)), sort), inputs
    )


def test_rows_of_nobody_and_empty_experts_have_no_gradient() -> None:
    held, sort = problem(9, "absent", torch.float32)
    looped(held, sort).sum().backward()
    assert (held["weights"].grad[int(sort[2][-1]) :] == 0).all()
    held, sort = problem(9, "empty experts", torch.float32)
    looped(held, sort).sum().backward()
    for name in ("gate_up", "down"):
        used = (held[name].grad != 0).any(dim=(1, 2))
        assert used.tolist() == [False, True, False, True, False]
