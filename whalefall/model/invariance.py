"""Batch invariance: what is computed for a token does not depend on what else is in its step.

Sums in another order have other last bits, and libraries choose the order by how many rows, keys
and numbers there are. In this mode every token is a row of its own, be it of a prompt, the last of
a text or a draft, and attends to the latents in the absorbed form, in pieces of ``split_keys``. So
it is all one how a prompt was cut and what of it was cached. What is left are products:

- In BF16 on CUDA and in FP32 on a CPU our kernels multiply ``block_rows`` rows at a time, however
  many there are, and add up each in one order. Our other kernels give a row the same bits in any
  company.
- Elsewhere the network takes one token after the other. The shape of every call then follows from
  the token's position, and no library has anything to choose by.

The promise holds on one machine with one build of PyTorch and, on a CPU, one number of threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whalefall.model.cache import Rows
from whalefall.ops.block_linear import streamed_linear
from whalefall.ops.few_rows import Weight
from whalefall.ops.linear import linear

_AT_ONCE = 256
"""Tokens whose attention is one launch: memory for their pieces is held at once."""


@dataclass(frozen=True)
class Invariance:
    """How a network keeps the tokens of a step apart; ``inference.make_invariant`` makes it so."""

    split_keys: int
    """Keys that attention adds up at a time, on CUDA: a multiple of 64."""
    block_rows: int | None
    """Rows that our kernels multiply at a time; None where they cannot: tokens go one by one."""

    def apart(self, groups: Sequence[Rows]) -> Iterator[Rows]:
        """The same tokens in the same line, each as a row of its own."""
        at_once = 1 if self.block_rows is None else _AT_ONCE
        for rows in groups:
            new = torch.arange(rows.width, dtype=torch.int32, device=rows.lengths.device)
            lengths = (rows.lengths.unsqueeze(1) + new).flatten()
            pages = rows.pages.repeat_interleave(rows.width, 0)
            for some in zip(lengths.split(at_once), pages.split(at_once), strict=True):
                yield Rows(1, *some, split_keys=self.split_keys)

    def linear(
        self, x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "rows out"]:
        """x W^T. For inference."""
        if self.block_rows is not None:
            return streamed_linear(x, Weight(weight), self.block_rows)
        return torch.cat([linear(row, weight) for row in x.split(1)])
