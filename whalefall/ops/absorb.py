"""The absorbed form of MLA around attention over latents (paper 2.1.1; arXiv 2405.04434, 2.1.2).

W_uk is folded into the query before attention and W_uv is applied to the mixed latents after it,
so that keys and values are never made. For inference: no gradient flows through. On CUDA each is
one kernel for BF16, whose result for a token does not depend on how many others there are; FP32
products are the library's.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel, runs_kernel
from whalefall.ops.rope import rotate


def absorb_query(
    q: Float[Tensor, "tokens heads qk"],
    rotation: Complex[Tensor, "tokens half"],
    w_uk: Float[Tensor, "heads nope kv_lora"],
) -> Float[Tensor, "tokens heads latent"]:
    """[q_nope W_uk, turned q_rope] of each head: the query that meets a cached latent.

    The first ``nope`` numbers of a query are folded, the rest turned in pairs (x_2i, x_2i+1) in
    FP32. ``w_uk`` is the keys' part of ``kv_b_proj.weight`` and may be a view of it.
    """
    if _runs_kernel(q, w_uk):
        from whalefall.kernels import absorb as kernel

        return kernel.absorb_query(q, rotation, w_uk)
    if runs_cpu_kernel(q) and has_rows(w_uk) and runs_cpu_kernel(rotation, dtype=torch.complex64):
        from whalefall.kernels.cpu import mla

        return mla.absorb_query(q, rotation, w_uk)
    nope = w_uk.shape[1]
    q_nope, q_rope = q.split_with_sizes([nope, q.shape[-1] - nope], -1)
    # Heads first, so that all heads are one batched product.
    folded = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    return torch.cat([folded, rotate(q_rope, rotation.unsqueeze(1))], -1)


def unfold_values(
    mixed: Float[Tensor, "tokens heads kv_lora"], w_uv: Float[Tensor, "heads v kv_lora"]
) -> Float[Tensor, "tokens values"]:
    """W_uv of each head's mixed latents, the heads side by side: the output projection's input.

    ``w_uv`` is the values' part of ``kv_b_proj.weight`` and may be a view of it.
    """
    if _runs_kernel(mixed, w_uv):
        from whalefall.kernels import absorb as kernel

        return kernel.unfold_values(mixed, w_uv)
    if runs_cpu_kernel(mixed) and has_rows(w_uv):
        from whalefall.kernels.cpu import mla

        return mla.unfold_values(mixed, w_uv)
    return torch.bmm(mixed.transpose(0, 1), w_uv.mT).transpose(0, 1).flatten(1)


def absorb_reference(
    q: Float[Tensor, "tokens heads qk"],
    rotation: Complex[Tensor, "tokens half"],
    w_uk: Float[Tensor, "heads nope kv_lora"],
) -> Float[Tensor, "tokens heads latent"]:
    """The definition in real numbers, in the type of its inputs."""
    nope = w_uk.shape[1]
    real, imaginary = rotation.real.unsqueeze(1), rotation.imag.unsqueeze(1)
    even, odd = q[..., nope::2], q[..., nope + 1 :: 2]
    turned = torch.stack([even * real - odd * imaginary, even * imaginary + odd * real], -1)
    folded = torch.einsum("thn,hnl->thl", q[..., :nope], w_uk)
    return torch.cat([folded, turned.flatten(-2)], -1)


def unfold_reference(
    mixed: Float[Tensor, "tokens heads kv_lora"], w_uv: Float[Tensor, "heads v kv_lora"]
) -> Float[Tensor, "tokens values"]:
    """The definition, in the type of its inputs."""
    return torch.einsum("thl,hvl->thv", mixed, w_uv).flatten(1)


def has_rows(weight: Tensor) -> bool:
    """Whether the matrix of each head is whole in memory, which a kernel of the CPU reads."""
    return weight.dtype == torch.float32 and weight.stride()[1:] == (weight.shape[2], 1)


def _runs_kernel(*tensors: Tensor) -> bool:
    return runs_kernel(*tensors) and all(x.dtype == torch.bfloat16 for x in tensors)
