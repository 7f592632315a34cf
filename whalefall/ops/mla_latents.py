"""From MLA's joint down-projection to what a decode step works on (paper 2.1.1, equations 1 to 6).

A row of the joint product holds a token's query latent, its key-value latent and its shared key.
The first is normed for the queries' up-projection; the others, normed and turned by position, are
the token's entry of the paged cache. For inference: no gradient flows through. On CUDA all is one
kernel.
"""

import torch
from jaxtyping import Complex, Float, Int, Shaped
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel, runs_kernel
from whalefall.ops.latent_attention import encode_latents
from whalefall.ops.rms_norm import reference as norm
from whalefall.ops.rms_norm import rms_norm
from whalefall.ops.rope import rotate


def mla_latents(
    joint: Float[Tensor, "tokens joint"],
    q_weight: Float[Tensor, "q_lora"] | None,
    kv_weight: Float[Tensor, "kv_lora"],
    rotation: Complex[Tensor, "tokens half"],
    store: Shaped[Tensor, "pages page size"],
    slots: Int[Tensor, "tokens"],
    eps: float = 1e-6,
) -> Float[Tensor, "tokens q_lora"] | None:
    """The normed query latent of each token; its entry of the cache is written on the way.

    A row of ``joint`` is [query latent, key-value latent, shared key]; without ``q_weight`` it has
    no query latent, and none is returned. ``store``, contiguous, has a row for each slot: the
    entry's numbers, or as uint8 what ``encode_latents`` makes of them in the type of ``joint``.
    Token t's goes to ``slots[t]``. Slots differ, but on CUDA a token whose slot is below 0 is not
    stored: the padding of a CUDA graph. Norms and turns are taken in FP32.
    """
    is_fp8 = store.dtype == torch.uint8
    if runs_kernel(joint, kv_weight) and (is_fp8 or runs_kernel(store)):
        from whalefall.kernels import mla_latents as kernel

        return kernel.forward(joint, q_weight, kv_weight, rotation, store, slots, eps)
    query, entry = _entries(joint, q_weight, kv_weight, rotation, eps)
    kept = encode_latents(entry, len(kv_weight)) if is_fp8 else entry.type_as(store)
    store.view(-1, store.shape[-1]).index_copy_(0, slots, kept)
    return query


def reference(
    joint: Float[Tensor, "tokens joint"],
    q_weight: Float[Tensor, "q_lora"] | None,
    kv_weight: Float[Tensor, "kv_lora"],
    rotation: Complex[Tensor, "tokens half"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "tokens q_lora"] | None, Float[Tensor, "tokens latent"]]:
    """The query latents and the cache's entries by definition, in the type of the inputs."""
    query, latent, key = _split(joint, q_weight, kv_weight, rotation)
    even, odd = key[:, ::2], key[:, 1::2]
    real, imaginary = rotation.real, rotation.imag
    turned = torch.stack([even * real - odd * imaginary, even * imaginary + odd * real], -1)
    entry = torch.cat([norm(latent, kv_weight, eps), turned.flatten(1)], -1)
    return None if q_weight is None else norm(query, q_weight, eps), entry


def _entries(
    joint: Tensor, q_weight: Tensor | None, kv_weight: Tensor, rotation: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    """As ``reference``, in the library's calls or a kernel of the CPU."""
    is_plain = runs_cpu_kernel(joint, q_weight, kv_weight)
    if is_plain and runs_cpu_kernel(rotation, dtype=torch.complex64):
        from whalefall.kernels.cpu import mla

        return mla.mla_latents(joint, q_weight, kv_weight, rotation, eps)
    query, latent, key = _split(joint, q_weight, kv_weight, rotation)
    entry = torch.cat([rms_norm(latent, kv_weight, eps), rotate(key, rotation)], -1)
    return None if q_weight is None else rms_norm(query, q_weight, eps), entry


def _split(
    joint: Tensor, q_weight: Tensor | None, kv_weight: Tensor, rotation: Tensor
) -> tuple[Tensor, ...]:
    query = 0 if q_weight is None else len(q_weight)
    return joint.split_with_sizes([query, len(kv_weight), 2 * rotation.shape[-1]], -1)
