"""Attention of prompts: MLA in its expanded form, over ragged sequences (paper 2.1.1).

A prompt, or a chunk of one whose beginning is cached, attends to keys and values that were expanded
from its latents. The queries come as their projection leaves them and are turned here; the one
rotated key of a token serves all heads and is not copied to them.
"""

import torch
from jaxtyping import Complex, Float, Int32
from torch import Tensor

from whalefall.ops.attention import attention
from whalefall.ops.rope import rotate


def prompt_attention(
    q: Float[Tensor, "tokens heads qk"],
    kv: Float[Tensor, "keys heads kv"],
    k_rope: Float[Tensor, "keys rope"],
    rotation: Complex[Tensor, "tokens half"],
    query_ends: Int32[Tensor, "sequences"],
    key_ends: Int32[Tensor, "sequences"],
    *,
    scale: float,
) -> Float[Tensor, "tokens values"]:
    """What every head of every token finds among the keys that it sees; not differentiable.

    Sequences lie side by side: sequence i has the queries from ``query_ends[i - 1]`` to
    ``query_ends[i]`` and the keys from ``key_ends[i - 1]`` to ``key_ends[i]``, no fewer keys than
    queries. Its last query sees all its keys, each earlier query one less.

    The last ``rope`` numbers of a query are turned by its ``rotation``; ``k_rope`` is turned
    already, and its rows may be part of longer ones. A head's key is the first ``qk - rope``
    numbers of ``kv`` and then ``k_rope``, its value the rest of ``kv``.

    On CUDA in BF16 the host reads nothing back, and a query's result has the same bits whatever
    other sequences there are.
    """
    if not (q.is_cuda and q.dtype == torch.bfloat16):
        return _by_shape(q, kv, k_rope, rotation, query_ends, key_ends, scale)
    from whalefall.kernels import prompt_attention as kernel

    return kernel.forward(q, kv, k_rope, rotation, (query_ends, key_ends), scale)


def reference(
    q: Float[Tensor, "tokens heads qk"],
    kv: Float[Tensor, "keys heads kv"],
    k_rope: Float[Tensor, "keys rope"],
    rotation: Complex[Tensor, "tokens half"],
    query_ends: Int32[Tensor, "sequences"],
    key_ends: Int32[Tensor, "sequences"],
    *,
    scale: float,
) -> Float[Tensor, "tokens values"]:
    """The definition, sequence by sequence, in the type of q."""
    nope = q.shape[-1] - k_rope.shape[-1]
    even, odd = q[..., nope::2], q[..., nope + 1 :: 2]
    cos, sin = rotation.real.unsqueeze(1), rotation.imag.unsqueeze(1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    out = q.new_empty(*q.shape[:2], kv.shape[-1] - nope)
    for queries, keys in _sequences(query_ends, key_ends):
        k_nope, v = kv[keys, :, :nope], kv[keys, :, nope:]
        scores = torch.einsum("qhd,khd->hqk", q[queries, :, :nope], k_nope)
        scores += torch.einsum("qhd,kd->hqk", turned[queries].type_as(q), k_rope[keys])
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(_earlier(queries, keys) + 1)
        weights = (scores * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, v)
    return out.flatten(1)


def _by_shape(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    rotation: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    scale: float,
) -> Tensor:
    """Sequences of one shape together, with whole keys, by the attention of training."""
    heads, nope = q.shape[1], q.shape[-1] - k_rope.shape[-1]
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], rotation.unsqueeze(1))], -1)
    out = q.new_empty(len(q), heads, kv.shape[-1] - nope)
    alike: dict[tuple[int, int], list[tuple[slice, slice]]] = {}
    for queries, keys in _sequences(query_ends, key_ends):
        shape = (queries.stop - queries.start, keys.stop - keys.start)
        alike.setdefault(shape, []).append((queries, keys))
    for (width, length), sequences in alike.items():
        own_q = torch.stack([q[queries] for queries, _ in sequences])
        own_kv = torch.stack([kv[keys] for _, keys in sequences])
        shared = torch.stack([k_rope[keys] for _, keys in sequences]).unsqueeze(2)
        k = torch.cat([own_kv[..., :nope], shared.expand(-1, -1, heads, -1)], -1)
        mask = None  # causal
        if length > width:
            seen = torch.ones(width, length, dtype=torch.bool, device=q.device)
            mask = seen.tril(length - width).expand(len(sequences), 1, -1, -1)
        batch = (x.transpose(1, 2) for x in (own_q, k, own_kv[..., nope:]))
        found = attention(*batch, scale=scale, mask=mask).transpose(1, 2)
        for (queries, _), of_sequence in zip(sequences, found, strict=True):
            out[queries] = of_sequence
    return out.flatten(1)


def _sequences(query_ends: Tensor, key_ends: Tensor) -> list[tuple[slice, slice]]:
    """Queries and keys of every sequence that has queries."""
    spans = []
    query, key = 0, 0
    for query_end, key_end in zip(query_ends.tolist(), key_ends.tolist(), strict=True):
        if query_end > query:
            spans.append((slice(query, query_end), slice(key, key_end)))
        query, key = query_end, key_end
    return spans


def _earlier(queries: slice, keys: slice) -> int:
    """Keys of a sequence before its first query's own."""
    return (keys.stop - keys.start) - (queries.stop - queries.start)
