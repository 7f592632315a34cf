"""The small steps of a decode step of bench-6b, at 1 to 256 tokens; peers are torch's calls.

At few tokens a launch is the cost: of these one, against a handful.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.ops.absorb import absorb_query, unfold_values
from whalefall.ops.decode_places import advance, decode_places
from whalefall.ops.gate import gate
from whalefall.ops.linear_fp32 import linear_fp32
from whalefall.ops.merge_norm import merge_norm
from whalefall.ops.mla_latents import mla_latents
from whalefall.ops.permute import gather_sum, sort_by_expert
from whalefall.ops.rms_norm import rms_norm
from whalefall.ops.rope import inverse_frequencies, rotate, rotations
from whalefall.ops.route import route
from whalefall.ops.silu_mul import silu_mul

HIDDEN, HEADS, NOPE, ROPE, VALUE, QUERY, LATENT = 2048, 16, 128, 64, 128, 1536, 512
EXPERTS, TOP_K, INNER = 64, 6, 1408
CHOICE = {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "scale": 2.5}


def rows() -> Iterator[Row]:
    for tokens in (1, 32, 128, 256):
        yield from _places(tokens)
        yield from _latents(tokens)
        yield from _absorbed(tokens)
        yield _gate(tokens)
        yield _merge(tokens)
        yield _silu(tokens)


def _places(rows: int) -> Iterator[Row]:
    slots = torch.arange(rows, device="cuda")
    lengths, accepted = torch.full_like(slots, 1088, dtype=torch.int32), torch.zeros_like(slots)
    tokens, turns = torch.zeros(rows, 1, dtype=torch.int64, device="cuda"), _rotation(4096)
    pages = torch.zeros(rows, 64, dtype=torch.int32, device="cuda")
    yield Row(
        f"decode_places, {rows}",
        lambda: decode_places(slots, lengths, tokens, pages, turns),
        bytes=2 * _bytes(slots, lengths, tokens, pages, turns[:rows]),
    )
    yield Row(
        f"advance, {rows}", lambda: advance(slots, lengths, tokens, lengths, tokens, accepted)
    )


def _latents(tokens: int) -> Iterator[Row]:
    joint, q_weight, kv_weight = (_random(tokens, QUERY + LATENT + ROPE), *_ones(QUERY, LATENT))
    rotation, slots = _rotation(tokens), torch.randperm(64 * 64, device="cuda")[:tokens]
    store = _random(64, 64, LATENT + ROPE)

    def peer() -> Tensor:
        query, latent, key = joint.split([QUERY, LATENT, ROPE], -1)
        entry = torch.cat([rms_norm(latent, kv_weight, 1e-6), rotate(key, rotation)], -1)
        store.view(-1, LATENT + ROPE).index_copy_(0, slots, entry)
        return rms_norm(query, q_weight, 1e-6)

    yield Row(
        f"mla_latents, {tokens}",
        lambda: mla_latents(joint, q_weight, kv_weight, rotation, store, slots),
        bytes=_bytes(joint, joint, q_weight, kv_weight, rotation),
        peer=peer,
        peer_name="5 steps",
    )


def _absorbed(tokens: int) -> Iterator[Row]:
    q, mixed = _random(tokens, HEADS, NOPE + ROPE), _random(tokens, HEADS, LATENT)
    w_uk, w_uv = _random(HEADS, NOPE + VALUE, LATENT).split([NOPE, VALUE], 1)
    rotation = _rotation(tokens)

    def peer() -> Tensor:
        q_nope, q_rope = q.split([NOPE, ROPE], -1)
        folded = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        return torch.cat([folded, rotate(q_rope, rotation.unsqueeze(1))], -1)

    yield Row(
        f"absorb_query, {tokens}",
        lambda: absorb_query(q, rotation, w_uk),
        bytes=_bytes(q, rotation, w_uk) + 2 * tokens * HEADS * (LATENT + ROPE),
        flops=2 * tokens * w_uk.numel(),
        peer=peer,
        peer_name="bmm, rotate, cat",
    )
    yield Row(
        f"unfold_values, {tokens}",
        lambda: unfold_values(mixed, w_uv),
        bytes=_bytes(mixed, w_uv) + 2 * tokens * HEADS * VALUE,
        flops=2 * tokens * w_uv.numel(),
        peer=lambda: torch.bmm(mixed.transpose(0, 1), w_uv.mT).transpose(0, 1).flatten(1),
        peer_name="bmm, copy",
    )


def _gate(tokens: int) -> Row:
    x, weight = _random(tokens, HIDDEN), 0.02 * _random(EXPERTS, HIDDEN)
    bias = torch.zeros(EXPERTS, device="cuda")

    def peer() -> tuple[Tensor, ...]:
        experts, weights, _, loads = route(linear_fp32(x, weight), bias, top_k=TOP_K, **CHOICE)
        (places, _), weights = sort_by_expert(experts, EXPERTS), weights.flatten()
        weights = torch.empty_like(weights).scatter_(0, places.flatten(), weights)
        return places, weights, loads.cumsum(0, dtype=torch.int32)

    return Row(
        f"gate, {tokens}",
        lambda: gate(x, weight, bias, top_k=TOP_K, **CHOICE),
        bytes=_bytes(x, weight) + tokens * TOP_K * 4 * 8,
        flops=2 * tokens * weight.numel(),
        peer=peer,
        peer_name="training's",
    )


def _merge(tokens: int) -> Row:
    residual, shared, routed = (_random(tokens * n, HIDDEN) for n in (1, 1, TOP_K))
    places = torch.randperm(tokens * TOP_K, device="cuda").view(tokens, TOP_K)
    (weight,) = _ones(HIDDEN)

    def peer() -> Tensor:
        return rms_norm(residual + gather_sum(routed, places) + shared, weight, 1e-6)

    return Row(
        f"merge_norm, {tokens}",
        lambda: merge_norm(residual, routed, places, shared, weight, 1e-6),
        bytes=_bytes(residual, shared, residual, residual, routed, weight),
        peer=peer,
        peer_name="4 steps",
    )


def _silu(tokens: int) -> Row:
    gate_part, up = _random(tokens, INNER), _random(tokens, INNER)
    return Row(
        f"silu_mul, {tokens}",
        lambda: silu_mul(gate_part, up),
        bytes=_bytes(gate_part, up, up),
        peer=lambda: F.silu(gate_part) * up,
        peer_name="2 steps",
    )


def _rotation(tokens: int) -> Tensor:
    return rotations(torch.arange(tokens, device="cuda"), inverse_frequencies(ROPE, 1e4, "cuda"))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _ones(*sizes: int) -> list[Tensor]:
    return [torch.ones(size, device="cuda", dtype=torch.bfloat16) for size in sizes]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
