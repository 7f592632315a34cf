"""How tokens reach their experts: the seam between the network and the machines it runs on."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.model.router import Routing
from whalefall.ops.permute import permute, sort_by_expert, unpermute


@dataclass(frozen=True)
class Dispatched:
    """Rows sorted by the expert that works on them."""

    rows: Float[Tensor, "pairs hidden"]
    weights: Float[Tensor, "pairs"]
    """Share of each row's output in its token's sum; the expert applies it (FP32)."""
    ends: Int[Tensor, "experts"]
    """``ends[e]`` is the row after the last one of expert e (int32, on the device)."""
    order: Int[Tensor, "..."]
    """How the rows were sorted, in the form that the dispatcher's own ``combine`` reads."""


@runtime_checkable
class Dispatcher(Protocol):
    """Stages two and four of a block. A block does not know where its experts live."""

    def dispatch(self, x: Float[Tensor, "tokens hidden"], routing: Routing) -> Dispatched: ...

    def combine(
        self, rows: Float[Tensor, "pairs hidden"], dispatched: Dispatched, routing: Routing
    ) -> Float[Tensor, "tokens hidden"]: ...


class LocalDispatcher:
    """All experts are here: dispatch sorts, combine puts back and sums."""

    def dispatch(self, x: Float[Tensor, "tokens hidden"], routing: Routing) -> Dispatched:
        places = sort_by_expert(routing.experts, len(routing.loads))
        weights = routing.weights.flatten()
        weights = torch.empty_like(weights).scatter_(0, places.flatten(), weights)
        ends = routing.loads.cumsum(0, dtype=torch.int32)
        return Dispatched(permute(x, places), weights, ends, places)

    def combine(
        self, rows: Float[Tensor, "pairs hidden"], dispatched: Dispatched, routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return unpermute(rows, dispatched.order)
