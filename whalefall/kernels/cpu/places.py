"""What a decode step reads of its sequences' slots, and how they move on."""

from torch import Tensor

from whalefall.kernels.cpu.compiled import ints, kernel, longs


def decode_places(
    slots: Tensor, lengths: Tensor, tokens: Tensor, pages: Tensor, rotation: Tensor, page: int
) -> tuple[Tensor, ...]:
    """As ``ops.decode_places.decode_places``."""
    rows, width, max_pages, half = len(slots), tokens.shape[1], pages.shape[1], rotation.shape[1]
    out = (
        tokens.new_empty(rows, width),
        lengths.new_empty(rows),
        pages.new_empty(rows, max_pages),
        lengths.new_empty(rows),
        tokens.new_empty(rows * width),
        rotation.new_empty(rows * width, half),
    )
    sizes = (rows, len(lengths), width, max_pages, len(rotation), half, page)
    _decode_places((slots, lengths, tokens, pages, rotation, *out), *sizes)
    return out


def advance(
    slots: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    positions: Tensor,
    chosen: Tensor,
    accepted: Tensor,
) -> Tensor:
    """As ``ops.decode_places.advance``."""
    last = chosen.new_empty(len(slots), 1)
    tensors = (slots, lengths, tokens, positions, chosen, accepted, last)
    _advance(tensors, len(slots), *tokens.shape)
    return last


@kernel
def _decode_places(
    slots, lengths, tokens, pages, rotation,
    own_tokens, own_lengths, own_pages, positions, entries, turns,
    rows, count, width, max_pages, context, half, page,
):  # fmt: skip
    slots, lengths, tokens = longs(slots, rows), ints(lengths, count), longs(tokens, (count, width))
    pages, rotation = ints(pages, (count, max_pages)), longs(rotation, (context, half))
    own_tokens, own_lengths = longs(own_tokens, (rows, width)), ints(own_lengths, rows)
    own_pages, positions = ints(own_pages, (rows, max_pages)), ints(positions, rows)
    # A complex number of two FP32 moves as one of 64 bits.
    entries, turns = longs(entries, (rows, width)), longs(turns, (rows, width, half))
    for row in range(rows):
        slot = slots[row]
        own_lengths[row], positions[row] = lengths[slot], lengths[slot] + 1
        for i in range(max_pages):
            own_pages[row, i] = pages[slot, i]
        for i in range(width):
            at = lengths[slot] + i
            own_tokens[row, i] = tokens[slot, i]
            entries[row, i] = pages[slot, min(at // page, max_pages - 1)] * page + at % page
            for j in range(half):
                turns[row, i, j] = rotation[at, j]


@kernel
def _advance(slots, lengths, tokens, positions, chosen, accepted, last, rows, count, width):
    slots, lengths, tokens = longs(slots, rows), ints(lengths, count), longs(tokens, (count, width))
    positions, chosen = ints(positions, rows), longs(chosen, (rows, width))
    accepted, last = longs(accepted, rows), longs(last, rows)
    for row in range(rows):
        last[row] = tokens[slots[row], 0] = chosen[row, accepted[row]]
        lengths[slots[row]] = positions[row] + accepted[row]
