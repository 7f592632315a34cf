"""Multi-head latent attention of a decode step, around the library's products."""

import numpy as np
from torch import Tensor

from whalefall.kernels.cpu.compiled import exp, floats, helper, ints, kernel
from whalefall.kernels.cpu.linear import multiply
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
        for query in range(width):
            seen = min(lengths[row] + query + 1, max_pages * page)
            weights = np.empty((seen, heads), np.float32)
            # All heads look at a page before the next one is read.
            for start in range(0, seen, page):
                keys = min(page, seen - start)
                latents = floats(
                    store + 4 * latent * page * pages[row, start // page], (keys, latent)
                )
                multiply(latents, q[row, query], weights[start : start + keys], 0)
            _softmax(weights, np.float32(scale))
            for head in range(heads):
                for i in range(value_dim):
                    out[row, query, head, i] = np.float32(0)
            for start in range(0, seen, page):
                keys = min(page, seen - start)
                latents = floats(
                    store + 4 * latent * page * pages[row, start // page], (keys, latent)
                )
                for head in range(heads):
                    _add(weights[start : start + keys, head], latents, out[row, query, head])


@helper
def _softmax(scores, scale):
    """Over the keys, for every head."""
    keys, heads = scores.shape
    for head in range(heads):
        largest, total = scores[0, head], np.float32(0)
        for key in range(1, keys):
            largest = max(largest, scores[key, head])
        for key in range(keys):
            scores[key, head] = exp((scores[key, head] - largest) * scale)
            total += scores[key, head]
        for key in range(keys):
            scores[key, head] /= total


@helper
def _add(weights, latents, out):
    """out += weights @ latents, of which the first numbers count; four rows at a time."""
    key = 0
    while key + 4 <= len(weights):
        a, b, c, d = weights[key], weights[key + 1], weights[key + 2], weights[key + 3]
        for i in range(len(out)):
            out[i] += (
                a * latents[key, i]
                + b * latents[key + 1, i]
                + c * latents[key + 2, i]
                + d * latents[key + 3, i]
            )
        key += 4
    while key < len(weights):
        for i in range(len(out)):
            out[i] += weights[key] * latents[key, i]
        key += 1


@helper
def turn(x, rotation, out):
    """Pairs (x_2i, x_2i+1) turned by complex numbers, given as pairs."""
    for i in range(0, len(x), 2):
        real, imaginary = rotation[i], rotation[i + 1]
        out[i] = x[i] * real - x[i + 1] * imaginary
        out[i + 1] = x[i] * imaginary + x[i + 1] * real
