"""What stands between MLA's projections and attention (paper 2.1.1, equations 4 to 11).

Every head's query and key has a part without position and a part that rotates with it; the
rotating key is one for all heads.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from whalefall.ops.function import runs_kernel
from whalefall.ops.rope import rotate


def mla_heads(
    q: Float[Tensor, "batch seq heads qk"],
    kv: Float[Tensor, "batch seq heads kv"],
    k_rope: Float[Tensor, "batch seq rope"],
    rotation: Complex[Tensor, "#batch seq half"],
) -> tuple[
    Float[Tensor, "batch seq heads qk"],
    Float[Tensor, "batch seq heads qk"],
    Float[Tensor, "batch seq heads v"],
]:
    """Queries, keys and values of every head from the outputs of their projections.

    The last ``rope`` numbers of a query are turned; a key is the first ``qk - rope`` numbers of
    ``kv`` and the turned ``k_rope``; the values are the rest of ``kv``, as a view. Pairs are
    (x_2i, x_2i+1), turned in FP32. Rows of ``k_rope`` may be part of longer ones.
    """
    if runs_kernel(q, kv, k_rope):
        return _MLAHeads.apply(q, kv, k_rope, rotation)
    return composed(q, kv, k_rope, rotation)


def composed(
    q: Float[Tensor, "batch seq heads qk"],
    kv: Float[Tensor, "batch seq heads kv"],
    k_rope: Float[Tensor, "batch seq rope"],
    rotation: Complex[Tensor, "#batch seq half"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch's own operations."""
    q_nope, q_rope = q.tensor_split([-k_rope.shape[-1]], -1)
    k_nope, v = kv.tensor_split([q_nope.shape[-1]], -1)
    turned = rotate(k_rope, rotation).unsqueeze(-2).expand(-1, -1, q.shape[2], -1)
    q = torch.cat([q_nope, rotate(q_rope, rotation.unsqueeze(-2))], -1)
    return q, torch.cat([k_nope, turned], -1), v


def reference(
    q: Float[Tensor, "batch seq heads qk"],
    kv: Float[Tensor, "batch seq heads kv"],
    k_rope: Float[Tensor, "batch seq rope"],
    rotation: Complex[Tensor, "#batch seq half"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in real numbers, in the type of its inputs."""
    cos, sin = rotation.real.unsqueeze(2), rotation.imag.unsqueeze(2)

    def turn(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    nope = q.shape[-1] - k_rope.shape[-1]
    shared = turn(k_rope.unsqueeze(2)).expand(-1, -1, q.shape[2], -1)
    turned_q = torch.cat([q[..., :nope], turn(q[..., nope:])], -1)
    return turned_q, torch.cat([kv[..., :nope], shared], -1), kv[..., nope:]


class _MLAHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        from whalefall.kernels import mla_heads as kernel

        ctx.save_for_backward(rotation)
        turned_q, k = kernel.forward(q, kv, k_rope, rotation)
        return turned_q, k, kv[..., q.shape[-1] - k_rope.shape[-1] :]

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        from whalefall.kernels import mla_heads as kernel

        return *kernel.backward(grad_q, grad_k, grad_v, *ctx.saved_tensors), None
