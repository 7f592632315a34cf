"""One measured kernel, at the sizes of the bench-6b network."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    name: str
    run: Callable[[], object]
    bytes: float | None = None
    """The fewest bytes that device memory must move."""
    flops: float | None = None
    peer: Callable[[], object] | None = None
    """The same result by a library."""
    peer_name: str = ""
