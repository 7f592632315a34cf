"""Norms, turn and cache entry of a decode step's latents, in one launch.

Two programs a token, each holding its part of the row: one norms the query latent, the other norms
the key-value latent, turns the shared key and writes both to the token's slot of the cache. A
token's row is read once and written once, 8 KB in BF16 for V3's sizes: at decoding's few tokens
the launch is the cost, and at a prefill's many memory is.

An FP8 entry is made of what would be stored in the type of the latents, so its bytes are those of
``encode_latents``; 128 numbers that share a scale are four of each thread of a warp.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from whalefall.kernels.mla_heads import _pairs, _turn

_TILE = tl.constexpr(128)  # numbers that share a scale


@triton.jit
def _normed(x_ptr, weight_ptr, column, DIM: tl.constexpr, eps):
    """DIM numbers over their root mean square, times the weight, in FP32."""
    inside = column < DIM
    x = tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps) * weight


@triton.jit
def _encoded(x, COLUMNS: tl.constexpr):
    """The bits of E4M3 and the scales of x, in tiles as ``kernels.quantize`` has them."""
    TILES: tl.constexpr = (COLUMNS + _TILE - 1) // _TILE
    tiles = tl.reshape(x.to(tl.float32), [TILES, COLUMNS // TILES])
    scales = tl.div_rn(tl.max(tl.abs(tiles), 1), 448.0)
    scales = tl.where(scales > 0, tl.maximum(scales, 2.0**-126), 1.0)
    codes = tl.div_rn(tiles, scales[:, None]).to(tl.float8e4nv)
    return tl.reshape(codes.to(tl.uint8, bitcast=True), [COLUMNS]), scales, tl.arange(0, TILES)


@triton.jit
def _latents_kernel(
    joint_ptr, q_weight_ptr, kv_weight_ptr, rotation_ptr, store_ptr, slots_ptr, query_ptr,
    joint_stride, rotation_stride, eps,
    QUERY: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr, LATENT_COLUMNS: tl.constexpr, ROPE_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = joint_ptr + token * joint_stride
    if tl.program_id(1) == 0:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        rope = tl.arange(0, ROPE_COLUMNS)[None, :]
        turn = tl.load(rotation_ptr + token * rotation_stride + rope, mask=rope < ROPE)
        key = tl.load(row + QUERY + LATENT + rope, mask=rope < ROPE)
        column = tl.arange(0, LATENT_COLUMNS)
        latent = _normed(row + QUERY, kv_weight_ptr, column, LATENT, eps)
        real, imaginary = _pairs(turn)
        key = _turn(key, real, imaginary)
        in_latent, in_rope = (column < LATENT) & (slot >= 0), (rope < ROPE) & (slot >= 0)
        dtype = store_ptr.dtype.element_ty
        if dtype == tl.uint8:
            codes, scales, tile = _encoded(latent.to(joint_ptr.dtype.element_ty), LATENT_COLUMNS)
            TILES: tl.constexpr = (LATENT + _TILE - 1) // _TILE
            entry = store_ptr + slot * (LATENT + 4 * TILES + 2 * ROPE)
            scales_at = (entry + LATENT).to(tl.pointer_type(tl.float32)) + tile
            key_at = (entry + LATENT + 4 * TILES).to(tl.pointer_type(tl.bfloat16)) + rope
            tl.store(entry + column, codes, mask=in_latent)
            tl.store(scales_at, scales, mask=(tile < TILES) & (slot >= 0))
            tl.store(key_at, key.to(tl.bfloat16), mask=in_rope)
        else:
            entry = store_ptr + slot * (LATENT + ROPE)
            tl.store(entry + column, latent.to(dtype), mask=in_latent)
            tl.store(entry + LATENT + rope, key.to(dtype), mask=in_rope)
    elif q_weight_ptr is not None:
        index = tl.arange(0, QUERY_COLUMNS)
        query = _normed(row, q_weight_ptr, index, QUERY, eps)
        at = query_ptr + token * QUERY + index
        tl.store(at, query.to(query_ptr.dtype.element_ty), mask=index < QUERY)


def forward(
    joint: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    rotation: Tensor,
    store: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor | None:
    """Query latents [tokens, q_lora] from joint [tokens, q_lora + kv_lora + rope]; fills store.

    rotation complex [tokens, rope/2], store [pages, page, kv_lora + rope], or bytes in place of
    these numbers, slots [tokens].
    """
    tokens, rope = len(joint), 2 * rotation.shape[-1]
    joint = joint if joint.stride(-1) == 1 else joint.contiguous()
    pairs = torch.view_as_real(rotation if rotation.stride(-1) == 1 else rotation.contiguous())
    query, parts = None, 1
    if q_weight is not None:
        query, parts = joint.new_empty(tokens, len(q_weight)), 2
    sizes = 0 if q_weight is None else len(q_weight), len(kv_weight), rope
    if tokens:
        _latents_kernel[(tokens, parts)](
            joint, q_weight, kv_weight, pairs, store.view(-1), slots, query,
            joint.stride(0), pairs.stride(0), eps, *sizes, *_padded(*sizes),
        )  # fmt: skip
    return query


@cache
def _padded(*sizes: int) -> tuple[int, ...]:
    return tuple(triton.next_power_of_2(max(1, size)) for size in sizes)
