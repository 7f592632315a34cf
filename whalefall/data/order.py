"""The order of rows as closed formulas: any row is found without walking the ones before it."""

from collections.abc import Sequence
from math import isqrt

from whalefall.data.draws import Key, draw_bits

_ROUNDS = 4
_WEIGHT_BITS = 48


def permute(index: int, size: int, *key: Key) -> int:
    """Where a shuffle of [0, size) that the key decides sends ``index``.

    A Feistel network on the digits (left, right) of a number in base ``side``: a round replaces
    them by (right, left + F(right) mod side), which the next can undo whatever F is, so each round,
    and hence all of them, is a bijection of [0, side squared). Four rounds of a pseudo-random F
    cannot be told from a random permutation (Luby and Rackoff). Numbers of ``size`` or more are
    sent on until one below comes out; a walk along a cycle of a bijection returns to the set it
    left, and two walks never meet, so what remains is a bijection of [0, size).
    """
    side = isqrt(size - 1) + 1
    while True:
        left, right = divmod(index, side)
        for step in range(_ROUNDS):
            left, right = right, (left + draw_bits(*key, step, right)) % side
        index = left * side + right
        if index < size:
            return index


class Interleave:
    """A fixed mixture of several streams: which stream a row comes from, and which of its rows.

    The first stream of weight w takes a row whenever floor(w * rows) grows; the rows it leaves
    are shared among the others in the same way. So every prefix of the mixture has each stream's
    share to within one row per stream, and each stream is read in its own order without gaps.

    Args:
        weights: positive, relative to each other.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # Of the rows that reach stream i, its part: in integers, so that no row is ever misplaced.
        self._parts = [
            round(weight / sum(weights[i:]) * 2**_WEIGHT_BITS) for i, weight in enumerate(weights)
        ]

    def locate(self, row: int) -> tuple[int, int]:
        """(stream, row of that stream) for a row of the mixture."""
        for stream, part in enumerate(self._parts):
            before = part * row >> _WEIGHT_BITS
            if part * (row + 1) >> _WEIGHT_BITS > before:
                return stream, before
            row -= before
        raise AssertionError("the last stream takes every row that reaches it")
