"""Who decodes what, and how the pieces of a row become one: split-KV for latent attention.

Rows of a batch have cached between a token and a hundred thousand, and every multiprocessor should
finish at the same time. So the pages of all rows are laid on one line, which is cut into ``parts``
of equal length: a part has the end of one row, some whole rows and the beginning of another. Where
rows are so equal that parts of whole rows are hardly longer, the cuts are between rows.

``schedule`` finds the cuts on the device from the lengths, so that its launch, and that of the
attention, depend on shapes only: Int32 [parts + 1 + rows, 2]. First, of each part and of the end,
the row and the page in it where it begins. Then, of each row, the first of its *slots* and their
number. A slot holds what a part made of a piece of a row: the mix of the values, FP32, and log2 of
the sum of exponentials. A row has as many as it has pieces, consecutive, and ``combine`` makes one
of them, in this order. A row in one piece is written to the output at once and uses none.

Which pieces a row is cut in depends on its neighbours, and so do its last bits. With ``split`` (in
pages) it is cut at its own multiples of ``split``, wherever the parts begin and end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from whalefall.kernels.device import multiprocessors

PAGE = tl.constexpr(64)
_LANES = tl.constexpr(32)
_WARP = 128  # numbers that a warp loads at once, in FP32
TILE_QUERIES = 64
"""Queries of a row (heads of all draft positions) that share the keys a program has loaded."""


def parts(queries: int, device: torch.device) -> int:
    """Programs that walk the rows are one a multiprocessor; those of a part share its pages."""
    return max(1, multiprocessors(device) // triton.cdiv(queries, TILE_QUERIES))


def slots(rows: int, parts: int, max_pages: int, split: int) -> int:
    """Room for all pieces: a cut adds one to those that rows have anyway."""
    if split:
        return rows * triton.cdiv(max_pages, split)
    return rows + parts if parts > 1 else 0


def schedule(lengths: Tensor, width: int, parts: int, max_pages: int, split: int) -> Tensor:
    """Of lengths [rows], where ``width`` new tokens follow what is cached. No split is 0."""
    rows = len(lengths)
    out = lengths.new_empty(parts + 1 + rows, 2)
    _latent_schedule_kernel[(parts + 1,)](
        lengths,
        out,
        rows,
        width,
        parts,
        triton.cdiv(max_pages, split) if split else 0,
        max(1, split),
        ROWS=max(32, triton.next_power_of_2(rows)),
    )
    return out


def combine(partial: Tensor, lse: Tensor, spans: Tensor, out: Tensor) -> None:
    """From the slots [slots, queries, values] of rows in several pieces to out [rows, ...]."""
    rows, queries, values = out.shape
    # Few rows are quick in many programs of a warp; many cost little where most are in one piece.
    few = rows * queries <= 1024
    columns = _WARP if few else triton.next_power_of_2(values)
    # The fewer the rows, the more pieces has each, and the more registers are there to await them.
    many_pieces = few and len(partial) > 8 * rows
    _combine_slots_kernel[(rows, queries, triton.cdiv(values, columns))](
        partial, lse, spans, out, queries, values,
        32 if many_pieces else 8, columns,
        num_warps=max(1, columns // _WARP), maxnreg=200 if many_pieces else 64,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts", "max_splits"])
def _latent_schedule_kernel(lengths, out, rows, width, parts, max_splits, unit, ROWS: tl.constexpr):
    """Program p finds where part p begins; the first also finds the rows' slots."""
    part = tl.program_id(0)
    row = tl.arange(0, ROWS)
    keys = tl.load(lengths + row, row < rows, other=-width) + width
    units = tl.cdiv(tl.cdiv(keys, PAGE), unit)
    longest = tl.max(units)
    even = tl.maximum(tl.cdiv(tl.sum(units), parts), 1)
    whole = tl.cdiv(rows, parts) * longest
    if whole * 16 <= even * 17:  # a sixteenth longer is cheaper than pieces to combine
        share = whole
        extent = tl.where(row < rows, longest, 0)
    else:
        share = even
        extent = units
    ends = tl.cumsum(extent)
    at = part * share
    before = ends <= at
    first_row = tl.sum((before & (row < rows)).to(tl.int32))
    first_page = (at - tl.max(tl.where(before, ends, 0))) * unit
    tl.store(out + 2 * part, first_row)
    tl.store(out + 2 * part + 1, tl.where(first_row < rows, first_page, 0))
    if part == 0:
        begin = ends - extent
        if max_splits > 0:
            slot, count = row * max_splits, units
        else:
            slot = row + begin // share
            count = (begin + units - 1) // share - begin // share + 1
        spans = out + 2 * (parts + 1 + row)
        tl.store(spans, slot, row < rows)
        tl.store(spans + 1, count, row < rows)


@triton.jit
def _combine_slots_kernel(
    partial, lse, spans, out, queries, values, IN_FLIGHT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Softmax over slots: their largest sum first, then one by one, so that neither batch nor tile
    changes the order, and no load waits for a sum."""
    row, query = tl.program_id(0), tl.program_id(1)
    slot = tl.load(spans + 2 * row).to(tl.int64)
    count = tl.load(spans + 2 * row + 1)
    if (count <= 1) | (slot < 0):  # no slot is; but asked for both, they come at the same time
        return
    value = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = value < values
    lse += slot * queries + query
    partial += (slot * queries + query) * values + value

    largest = tl.full((_LANES,), float("-inf"), tl.float32)
    for first in range(0, count, _LANES):
        piece = first + tl.arange(0, _LANES)
        theirs = tl.load(lse + piece * queries, piece < count, other=float("-inf"))
        largest = tl.maximum(largest, theirs)
    best = tl.max(largest, 0)  # finite: the first slot has the row's first key, which all see
    total = tl.cast(0.0, tl.float32)
    mixed = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, count, IN_FLIGHT):
        for i in tl.static_range(IN_FLIGHT):
            piece = first + i
            theirs = tl.load(lse + piece * queries, piece < count, other=float("-inf"))
            there = inside & (piece < count)
            their_mix = tl.load(partial + piece.to(tl.int64) * queries * values, there, other=0.0)
            share = tl.exp2(theirs - best)
            total += share
            mixed = tl.fma(their_mix, share, mixed)
    at = out + (row.to(tl.int64) * queries + query) * values + value
    tl.store(at, (mixed / total).to(out.dtype.element_ty), inside)
