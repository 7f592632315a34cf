"""Weights in FP32, of which the network holds the BF16 half (``ops.halves``)."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from whalefall.ops.halves import join, split


class Masters(Mapping[str, Tensor]):
    """FP32 weights by name, each joined when it is asked for; one without remainder is as it is.

    To hold them all at once would take as much memory again.
    """

    def __init__(self, weights: Mapping[str, Tensor], remainders: Mapping[str, Tensor]):
        """``remainders`` (int16) are those of BF16 ``weights`` of the same names."""
        self.weights = weights
        self.remainders = remainders

    def __getitem__(self, name: str) -> Tensor:
        weight = self.weights[name]
        return join(weight, self.remainders[name]) if name in self.remainders else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def tensors(self) -> list[Tensor]:
        """What they are stored in."""
        stored = (*self.weights.values(), *self.remainders.values())
        return [tensor.detach() for tensor in stored]

    def pinned(self) -> "Masters":
        """Room for a copy of each tensor in memory that a GPU can write by itself."""

        def room(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                for name, tensor in tensors.items()
            }

        return Masters(room(self.weights), room(self.remainders))

    @torch.no_grad()
    def copy_(self, values: Mapping[str, Tensor]) -> None:
        """Take over the values, FP32 or BF16, of the same names."""
        for name, weight in self.weights.items():
            if name in self.remainders:
                rounded, remainder = split(values[name].float())
                weight.copy_(rounded)
                self.remainders[name].copy_(remainder)
            else:
                weight.copy_(values[name])
