"""Multi-head latent attention of a decode step, around the library's products."""

import numpy as np
from torch import Tensor

from whalefall.kernels.cpu.compiled import exp, floats, helper, ints, kernel
from whalefall.kernels.cpu.norm import norm


def mla_latents(
    joint: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    rotation: Tensor,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """The normed query latents, and the cache's entries (``ops.mla_latents``)."""
    tokens, q_lora = len(joint), 0 if q_weight is None else len(q_weight)
    kv_lora, rope = len(kv_weight), 2 * rotation.shape[1]
    query, entries = joint.new_empty(tokens, q_lora), joint.new_empty(tokens, kv_lora + rope)
    tensors = (joint, q_weight, kv_weight, rotation, query, entries)
    _mla_latents(tensors, tokens, q_lora, kv_lora, rope, eps)
    return None if q_weight is None else query, entries


def absorb_query(q: Tensor, rotation: Tensor, w_uk: Tensor) -> Tensor:
    """As ``ops.absorb.absorb_query``."""
    tokens, heads, qk = q.shape
    _, nope, kv_lora = w_uk.shape
    out = q.new_empty(tokens, heads, kv_lora + qk - nope)
    sizes = (tokens, heads, nope, qk - nope, kv_lora, w_uk.stride(0))
    _absorb_query((q, rotation, w_uk, out), *sizes)
    return out


def unfold_values(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """As ``ops.absorb.unfold_values``."""
    tokens, heads, kv_lora = mixed.shape
    out = mixed.new_empty(tokens, heads * w_uv.shape[1])
    sizes = (tokens, heads, w_uv.shape[1], kv_lora, w_uv.stride(0))
    _unfold_values((mixed, w_uv, out), *sizes)
    return out


def latent_attention(
    q: Tensor, store: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> Tensor:
    """As ``ops.latent_attention.latent_attention``."""
    rows, width, heads, latent = q.shape
    out = q.new_empty(rows, width, heads, value_dim)
    sizes = (rows, width, heads, latent, value_dim, store.shape[1], pages.shape[1])
    _latent_attention((q, store, pages, lengths, out), *sizes, scale)
    return out


@kernel
def _mla_latents(
    joint, q_weight, kv_weight, rotation, query, entries, tokens, q_lora, kv_lora, rope, eps
):
    joint = floats(joint, (tokens, q_lora + kv_lora + rope))
    q_weight, kv_weight = floats(q_weight, q_lora), floats(kv_weight, kv_lora)
    query, entries = floats(query, (tokens, q_lora)), floats(entries, (tokens, kv_lora + rope))
    rotation = floats(rotation, (tokens, rope))
    for token in range(tokens):
        row, entry = joint[token, q_lora:], entries[token]
        norm(joint[token], q_weight, query[token], eps)
        norm(row, kv_weight, entry, eps)
        turn(row[kv_lora:], rotation[token], entry[kv_lora:])


@kernel
def _absorb_query(q, rotation, w_uk, out, tokens, heads, nope, rope, kv_lora, stride):
    q, out = floats(q, (tokens, heads, nope + rope)), floats(out, (tokens, heads, kv_lora + rope))
    rotation = floats(rotation, (tokens, rope))
    for head in range(heads):
        weight = floats(w_uk + 4 * stride * head, (nope, kv_lora))
        for token in range(tokens):
            row, folded = q[token, head], out[token, head]
            for j in range(kv_lora):
                folded[j] = np.float32(0)
            for i in range(nope):
                for j in range(kv_lora):
                    folded[j] += row[i] * weight[i, j]
            turn(row[nope:], rotation[token], folded[kv_lora:])


@kernel
def _unfold_values(mixed, w_uv, out, tokens, heads, values, kv_lora, stride):
    mixed, out = floats(mixed, (tokens, heads, kv_lora)), floats(out, (tokens, heads, values))
    for head in range(heads):
        weight = floats(w_uv + 4 * stride * head, (values, kv_lora))
        for token in range(tokens):
            for i in range(values):
                total = np.float32(0)
                for j in range(kv_lora):
                    total += weight[i, j] * mixed[token, head, j]
                out[token, head, i] = total


@kernel
def _latent_attention(
    q, store, pages, lengths, out, rows, width, heads, latent, value_dim, page, max_pages, scale
):
    q, out = floats(q, (rows, width, heads, latent)), floats(out, (rows, width, heads, value_dim))
    pages, lengths = ints(pages, (rows, max_pages)), ints(lengths, rows)
    for row in range(rows):
        entries = np.empty(lengths[row] + width, np.int64)
        for key in range(len(entries)):
            entries[key] = pages[row, key // page] * page + key % page
        for query in range(width):
            seen = lengths[row] + query + 1
            for head in range(heads):
                mix(
                    q[row, query, head],
                    store,
                    entries[:seen],
                    out[row, query, head],
                    np.float32(scale),
                )


@helper
def mix(q, store, entries, out, scale):
    """One head's weighted mean of the latents at these entries, four of them at a time."""
    latent, keys = len(q), len(entries)
    weights = np.zeros(-(-keys // 4) * 4, np.float32)
    largest = np.float32(-np.inf)
    for key in range(0, keys, 4):
        a = b = c = d = np.float32(0)
        first, second, third, fourth = four_latents(store, entries, key, latent)
        for i in range(latent):
            a += q[i] * first[i]
            b += q[i] * second[i]
            c += q[i] * third[i]
            d += q[i] * fourth[i]
        weights[key], weights[key + 1], weights[key + 2], weights[key + 3] = a, b, c, d
        largest = max(largest, a, b, c, d)  # past the end the last one again
    total = np.float32(0)
    for key in range(keys):
        weights[key] = exp((weights[key] - largest) * scale)
        total += weights[key]
    for key in range(keys, len(weights)):
        weights[key] = np.float32(0)
    for i in range(len(out)):
        out[i] = np.float32(0)
    for key in range(0, keys, 4):
        a, b = weights[key] / total, weights[key + 1] / total
        c, d = weights[key + 2] / total, weights[key + 3] / total
        first, second, third, fourth = four_latents(store, entries, key, latent)
        for i in range(len(out)):
            out[i] += a * first[i] + b * second[i] + c * third[i] + d * fourth[i]


@helper
def four_latents(store, entries, key, latent):
    """Those from ``key`` on; past the end the last one again."""
    last = len(entries) - 1
    return (
        floats(store + 4 * latent * entries[key], latent),
        floats(store + 4 * latent * entries[min(key + 1, last)], latent),
        floats(store + 4 * latent * entries[min(key + 2, last)], latent),
        floats(store + 4 * latent * entries[min(key + 3, last)], latent),
    )


@helper
def turn(x, rotation, out):
    """Pairs (x_2i, x_2i+1) turned by complex numbers, given as pairs."""
    for i in range(0, len(x), 2):
        real, imaginary = rotation[i], rotation[i + 1]
        out[i] = x[i] * real - x[i + 1] * imaginary
        out[i + 1] = x[i] * imaginary + x[i + 1] * real
