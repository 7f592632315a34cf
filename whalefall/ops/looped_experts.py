"""The routed experts in training on a CPU: from tokens to tokens, expert by expert.

What one expert makes of its rows stays in the cache from the gather to the product that ends it,
where an operation for all rows would write each of its results to memory and read it again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from whalefall.ops import swiglu
from whalefall.ops.permute import gather_sum


def looped_experts(
    x: Float[Tensor, "tokens hidden"],
    places: Int[Tensor, "tokens top_k"],
    row_tokens: Int[Tensor, "rows"],
    weights: Float[Tensor, "rows"],
    ends: Int[Tensor, "experts"],
    gate_up: Float[Tensor, "experts twice hidden"],
    down: Float[Tensor, "experts hidden inner"],
) -> Float[Tensor, "tokens hidden"]:
    """Each token's experts, down(silu(gate(x)) * up(x) * weight), summed in the order of choice.

    ``places`` and ``row_tokens`` as in ``ops.permute``, ``ends`` as in ``ops.grouped_linear``.
    Rows from ``ends[-1]`` on belong to nobody: they count as nothing and have no gradient.
    """
    return _LoopedExperts.apply(x, places, row_tokens, weights, ends, gate_up, down)


def reference(
    x: Float[Tensor, "tokens hidden"],
    row_tokens: Int[Tensor, "rows"],
    weights: Float[Tensor, "rows"],
    ends: Int[Tensor, "experts"],
    gate_up: Float[Tensor, "experts twice hidden"],
    down: Float[Tensor, "experts hidden inner"],
) -> Float[Tensor, "tokens hidden"]:
    """The definition, in the type of its inputs (float64 for tests)."""
    out, start = torch.zeros_like(x), 0
    for end, up_weight, down_weight in zip(ends.tolist(), gate_up, down, strict=True):
        tokens = row_tokens[start:end].long()
        activated = swiglu.reference(x[tokens] @ up_weight.T, weights[start:end])
        out = out.index_add(0, tokens, activated @ down_weight.T)
        start = end
    return out


class _LoopedExperts(torch.autograd.Function):
    """The gathered rows are gathered again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        places: Tensor,
        row_tokens: Tensor,
        weights: Tensor,
        ends: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        rows, kept = x.new_empty(sum(sizes), x.shape[1]), []
        by_row, by_expert = (row_tokens, weights, rows), (gate_up, down)
        for tokens, shares, out, own_up, own_down in _each(sizes, by_row, by_expert):
            joint = x.index_select(0, tokens) @ own_up.T
            activated = swiglu.forward(joint, shares)
            torch.mm(activated, own_down.T, out=out)
            kept += [joint, activated]
        ctx.sizes = sizes
        ctx.save_for_backward(x, places, row_tokens, weights, gate_up, down, *kept)
        return gather_sum(rows, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, places, row_tokens, weights, gate_up, down, *kept = ctx.saved_tensors
        grad_rows, grad_weights = x.new_empty(sum(ctx.sizes), x.shape[1]), torch.zeros_like(weights)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        by_row = (row_tokens, weights, grad_rows, grad_weights)
        by_expert = (gate_up, down, grad_gate_up, grad_down)
        parts = zip(_each(ctx.sizes, by_row, by_expert), kept[::2], kept[1::2], strict=True)
        for (tokens, shares, out, out_shares, *own), joint, activated in parts:
            own_up, own_down, out_up, out_down = own
            grad_own = grad.index_select(0, tokens)
            torch.mm(grad_own.T, activated, out=out_down)
            grad_joint, grad_shares = swiglu.backward(grad_own @ own_down, joint, shares)
            assert grad_shares is not None  # because there are shares
            out_shares.copy_(grad_shares)
            torch.mm(grad_joint.T, x.index_select(0, tokens), out=out_up)
            torch.mm(grad_joint, own_up, out=out)
        grad_x = gather_sum(grad_rows, places)
        return grad_x, None, None, grad_weights, None, grad_gate_up, grad_down


def _each(
    sizes: list[int], by_row: Sequence[Tensor], by_expert: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Each expert's part of all; rows of nobody are left out."""
    rows = sum(sizes)
    parts = [tensor[:rows].split_with_sizes(sizes) for tensor in by_row]
    return zip(*parts, *(tensor.unbind() for tensor in by_expert), strict=True)
