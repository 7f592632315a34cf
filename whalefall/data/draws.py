"""Random draws that are functions of their key, so that nothing depends on order or workers."""

import hashlib

import numpy as np

Key = int | str


def draw_bits(*key: Key, bits: int = 64) -> int:
    """A uniform integer of ``bits`` (a multiple of 8, at most 512) that only the key decides."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=bits // 8).digest()
    return int.from_bytes(digest, "little")


def draw(*key: Key) -> float:
    """A uniform number in [0, 1) that only the key decides."""
    return draw_bits(*key, bits=48) / 2**48


def generator(*key: Key) -> np.random.Generator:
    """A stream of draws that only the key decides."""
    return np.random.Generator(np.random.Philox(key=draw_bits(*key, bits=128)))
