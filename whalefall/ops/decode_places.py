"""A decode step's first and last act on what is kept of every sequence: where is it, move it on.

Each is a handful of indexing calls on a few numbers, in which only the launches cost; on CUDA each
is one kernel. What is kept lies in slots, one a sequence (``engine.slots``), and ``slots`` says
which of them the rows of a step are.
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Int, Int32
from torch import Tensor

from whalefall.ops.function import runs_cpu_kernel
from whalefall.ops.latent_attention import PAGE


class Places(NamedTuple):
    """Rows that each continue by their last token and its drafts: ``width`` tokens."""

    tokens: Int[Tensor, "rows width"]
    lengths: Int[Tensor, "rows"]
    """Tokens of each that were cached before (int32)."""
    pages: Int[Tensor, "rows max_pages"]
    positions: Int[Tensor, "rows"]
    """Of the first token that each is to get (int32): the one after its last."""
    entries: Int[Tensor, "tokens"]
    """Each token's place in the cache: page times 64, plus the place in the page (int64)."""
    rotation: Complex[Tensor, "tokens half"]
    """Each token's rotary turn."""


def decode_places(
    slots: Int[Tensor, "rows"],
    lengths: Int32[Tensor, "slots"],
    tokens: Int[Tensor, "slots width"],
    pages: Int32[Tensor, "slots max_pages"],
    rotation: Complex[Tensor, "positions half"],
) -> Places:
    """What a step needs to know of the rows in these slots.

    ``lengths`` counts the tokens that are cached; ``tokens`` has the one after those, and drafts
    of more; ``pages`` must reach as far, and ``rotation`` has the turns of all positions.
    """
    if slots.is_cuda:
        from whalefall.kernels import decode_places as kernel

        return Places(*kernel.decode_places(slots, lengths, tokens, pages, rotation, PAGE))
    if _is_compiled(slots, lengths, tokens, pages) and rotation.is_contiguous():
        from whalefall.kernels.cpu import places as cpu_kernel

        return Places(*cpu_kernel.decode_places(slots, lengths, tokens, pages, rotation, PAGE))
    own, table = lengths[slots], pages[slots]
    positions = own.unsqueeze(1) + torch.arange(tokens.shape[1], device=slots.device)
    turns = rotation[positions.flatten()]
    return Places(tokens[slots], own, table, own + 1, cache_entries(table, positions), turns)


def cache_entries(
    pages: Int[Tensor, "rows max_pages"], positions: Int[Tensor, "rows new"]
) -> Int[Tensor, "tokens"]:
    """Where tokens at these positions are in the cache (int64), row by row."""
    page = pages.gather(1, positions // PAGE).long()
    return (page * PAGE + positions % PAGE).flatten()


def advance(
    slots: Int[Tensor, "rows"],
    lengths: Int32[Tensor, "slots"],
    tokens: Int[Tensor, "slots width"],
    positions: Int32[Tensor, "rows"],
    chosen: Int[Tensor, "rows width"],
    accepted: Int[Tensor, "rows"],
) -> Int[Tensor, "rows 1"]:
    """Moves these slots past their accepted drafts; the token that each goes on from.

    ``positions`` are those of the first tokens chosen. Lengths and first tokens are written; new
    drafts are for the caller to write. Slots may come twice where nobody reads them.
    """
    if slots.is_cuda:
        from whalefall.kernels import decode_places as kernel

        return kernel.advance(slots, lengths, tokens, positions, chosen, accepted)
    if _is_compiled(slots, lengths, tokens, positions) and runs_cpu_kernel(
        chosen, accepted, dtype=torch.int64
    ):
        from whalefall.kernels.cpu import places as cpu_kernel

        return cpu_kernel.advance(slots, lengths, tokens, positions, chosen, accepted)
    last = chosen.gather(1, accepted.unsqueeze(1))
    lengths[slots] = (positions + accepted).to(lengths.dtype)
    tokens[slots, :1] = last
    return last


def _is_compiled(slots: Tensor, lengths: Tensor, tokens: Tensor, others: Tensor) -> bool:
    narrow = runs_cpu_kernel(lengths, others, dtype=torch.int32)
    return narrow and runs_cpu_kernel(slots, tokens, dtype=torch.int64)
