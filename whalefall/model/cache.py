"""The latent cache: the 576 numbers a token and layer that decoding reads (paper 2.1.1).

The memory is cut into pages of 64 tokens, as vLLM does it, and a sequence holds any pages in any
order; which it holds is the business of whoever runs the network (``engine/pages.py``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from jaxtyping import Complex, Int
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.errors import UserError
from whalefall.ops.decode_places import Places, cache_entries
from whalefall.ops.latent_attention import PAGE, encoded_size, plan_attention
from whalefall.ops.transfer import sent


def entry_bytes(
    config: ModelConfig, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False
) -> int:
    """Cache bytes of a token in one layer."""
    if fp8:
        return encoded_size(config.latent_dim, config.kv_lora_rank)
    return config.latent_dim * dtype.itemsize


def bytes_per_token(
    config: ModelConfig, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False
) -> int:
    """Cache bytes of a token over all layers: 70,272 for V3 in BF16 (arXiv 2505.09343, table 1)."""
    return config.num_hidden_layers * entry_bytes(config, dtype, fp8=fp8)


def multi_head_bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """What plain multi-head attention would cache: a key and a value of ``v_head_dim`` a head."""
    width = 2 * config.num_attention_heads * config.v_head_dim
    return config.num_hidden_layers * width * dtype.itemsize


class LatentCache:
    """The latents of every layer, MTP's last, and the rotary turns of every position.

    ``dtype`` is the network's. With ``fp8`` a latent is bytes, as ``encode_latents`` makes them.
    Raises UserError where network or GPU do not suit that.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        rotation: Complex[Tensor, "positions half"],
        *,
        mtp: bool = False,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
    ):
        if fp8:
            _check_fp8(config, rotation.device)
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        kept = torch.uint8 if fp8 else dtype
        size = entry_bytes(config, dtype, fp8=fp8) // kept.itemsize
        shape = (layers, pages, PAGE, size)
        self.latents = torch.zeros(shape, device=rotation.device, dtype=kept)
        self.rotation = rotation
        self.dtype = dtype


@dataclass(frozen=True)
class Rows:
    """Sequences that each continue by the same number of tokens in this step."""

    width: int
    """New tokens of a sequence: one and its drafts, or a chunk of a prompt."""
    lengths: Int[Tensor, "rows"]
    """Tokens of each that were cached before (int32)."""
    pages: Int[Tensor, "rows max_pages"]
    """The pages of each, in the order of its tokens (int32); entries past its end may be any."""
    cached: int | None = None
    """The one length of all of them, where attention is to take the expanded form."""
    split_keys: int | None = None
    """As ``latent_attention`` takes it."""

    @property
    def tokens(self) -> int:
        return len(self.lengths) * self.width


@dataclass(frozen=True)
class Prompts:
    """Sequences whose keys and values are expanded, side by side."""

    key_slots: Int[Tensor, "keys"]
    """Of all tokens that each has by now: where they are in the cache."""
    query_ends: Int[Tensor, "sequences"]
    key_ends: Int[Tensor, "sequences"]

    @classmethod
    def of(cls, groups: Sequence[Rows]) -> Self | None:
        if not groups:
            return None
        device = groups[0].lengths.device
        lengths = [(rows.width, cast(int, rows.cached) + rows.width) for rows in groups]
        each = [pair for pair, rows in zip(lengths, groups, strict=True) for _ in rows.lengths]
        ends = torch.tensor(each, dtype=torch.int32).cumsum(0, dtype=torch.int32).T.contiguous()
        slots = [
            cache_entries(rows.pages, torch.arange(keys, device=device).expand(len(rows.pages), -1))
            for rows, (_, keys) in zip(groups, lengths, strict=True)
        ]
        query_ends, key_ends = sent(ends, device)
        return cls(torch.cat(slots), query_ends, key_ends)


@dataclass(frozen=True)
class CachedStep:
    """Where the tokens of one step belong. They are in a line: row by row, group by group."""

    cache: LatentCache
    groups: Sequence[Rows]
    """Those that attend in the absorbed form."""
    plans: Sequence[Tensor | None]
    """For each of them how attention is spread over a GPU: the same in all layers."""
    prompts: Prompts | None
    """Those that attend in the expanded form; their tokens come after the others'."""
    slots: Int[Tensor, "tokens"]
    """Place in the cache: page times 64, plus the place in the page (int64)."""
    rotation: Complex[Tensor, "tokens half"]

    @classmethod
    def of(
        cls,
        cache: LatentCache,
        groups: Sequence[Rows],
        heads: int,
        places: Places | None = None,
    ) -> Self:
        """All of it follows from lengths and pages; groups that are expanded come last.

        ``places`` are those of the tokens, where they are known.
        """
        if places is None:
            parts = zip(*map(_places, groups), strict=True)
            positions, slots = (torch.cat(part) if len(part) > 1 else part[0] for part in parts)
            rotation = cache.rotation[positions]
        else:
            slots, rotation = places.entries, places.rotation
        absorbed = [rows for rows in groups if rows.cached is None]
        plans = [_plan(rows, heads, cache.dtype) for rows in absorbed]
        prompts = Prompts.of(groups[len(absorbed) :])
        return cls(cache, absorbed, plans, prompts, slots, rotation)

    def alone(self) -> Iterator[Self]:
        """The step of each token by itself, where every token is a group of its own."""
        parts = zip(
            self.groups, self.slots.split(1), self.rotation.split(1), self.plans, strict=True
        )
        for rows, slots, rotation, plan in parts:
            yield replace(self, groups=[rows], slots=slots, rotation=rotation, plans=[plan])


def _check_fp8(config: ModelConfig, device: torch.device) -> None:
    if config.kv_lora_rank % 4:
        raise UserError(
            "an FP8 cache needs a kv_lora_rank that is a multiple of 4, and this network's is "
            f"{config.kv_lora_rank}: use fp8_cache=false"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            "an FP8 cache needs a GPU of compute capability 8.9 or more, and "
            f"{torch.cuda.get_device_name(device)} has less: use fp8_cache=false"
        )


def _places(rows: Rows) -> tuple[Tensor, Tensor]:
    new = torch.arange(rows.width, device=rows.lengths.device)
    positions = rows.lengths.unsqueeze(1) + new
    return positions.flatten(), cache_entries(rows.pages, positions)


def _plan(rows: Rows, heads: int, dtype: torch.dtype) -> Tensor | None:
    return plan_attention(
        rows.lengths,
        width=rows.width,
        heads=heads,
        max_pages=rows.pages.shape[1],
        dtype=dtype,
        split_keys=rows.split_keys,
    )
