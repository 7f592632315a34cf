"""How tokens reach their experts: the seam between the network and the machines it runs on.

What travels are tokens: one goes once to each machine that has experts of it, becomes a row for
each of them there, and comes back as the rows' sum.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.model.router import Routing
from whalefall.ops.permute import sort_by_expert


@dataclass(frozen=True)
class Dispatched:
    """Tokens where their experts are, and how they become rows sorted by expert."""

    x: Float[Tensor, "tokens hidden"]
    places: Int[Tensor, "tokens top_k"]
    """The row of each choice; -1 if that expert is elsewhere."""
    row_tokens: Int[Tensor, "rows"]
    """The token of each row."""
    row_weights: Float[Tensor, "rows"]
    """Share of each row's output in its token's sum; the expert applies it (FP32)."""
    ends: Int[Tensor, "experts"]
    """``ends[e]`` is the row after the last one of expert e (int32, on the device)."""


@runtime_checkable
class Dispatcher(Protocol):
    """Stages two and four of a block. A block does not know where its experts live."""

    def dispatch(self, x: Float[Tensor, "tokens hidden"], routing: Routing) -> Dispatched: ...

    def combine(
        self, summed: Float[Tensor, "there hidden"], dispatched: Dispatched, routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        """From what the experts made of ``dispatched`` to the tokens that were sent."""
        ...


class LocalDispatcher:
    """All experts are here: dispatch sorts, and nothing travels."""

    def dispatch(self, x: Float[Tensor, "tokens hidden"], routing: Routing) -> Dispatched:
        places, row_tokens = sort_by_expert(routing.experts, len(routing.loads))
        weights = routing.weights.flatten()
        row_weights = torch.empty_like(weights).scatter_(0, places.flatten(), weights)
        ends = routing.loads.cumsum(0, dtype=torch.int32)
        return Dispatched(x, places, row_tokens, row_weights, ends)

    def combine(
        self, summed: Float[Tensor, "tokens hidden"], dispatched: Dispatched, routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return summed
