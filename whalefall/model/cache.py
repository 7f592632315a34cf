"""The latent cache: the 576 numbers a token and layer that decoding reads (paper 2.1.1)."""

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.errors import UserError


def bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Cache bytes of a token over all layers: 70,272 for V3 in BF16 (arXiv 2505.09343, table 1)."""
    return config.num_hidden_layers * config.latent_dim * dtype.itemsize


def multi_head_bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """What plain multi-head attention would cache: a key and a value of ``v_head_dim`` a head."""
    width = 2 * config.num_attention_heads * config.v_head_dim
    return config.num_hidden_layers * width * dtype.itemsize


class LatentCache:
    """Room for ``capacity`` tokens of each of ``batch`` sequences, of unequal lengths.

    A forward pass of q new tokens asks for ``positions(q)`` and ``mask(q)``, each layer
    ``append``s its latents and reads all of them, and ``advance(q)`` closes the step.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        shape = (config.num_hidden_layers, batch, capacity, config.latent_dim)
        self.latents = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch

    @property
    def capacity(self) -> int:
        return self.latents.shape[2]

    def row(self, index: int) -> Self:
        """The cache of one sequence, sharing its memory; its length is its own."""
        view = object.__new__(type(self))
        view.latents = self.latents[:, index : index + 1]
        view.lengths = [self.lengths[index]]
        return view

    def keep(self, rows: Sequence[int]) -> None:
        """Let the other sequences go, and their memory with them."""
        self.latents = self.latents[:, rows]
        self.lengths = [self.lengths[row] for row in rows]

    def positions(self, new: int) -> Int[Tensor, "batch new"]:
        """Positions of the next ``new`` tokens. Raises UserError where they do not fit."""
        if max(self.lengths) + new > self.capacity:
            raise UserError(
                f"{max(self.lengths)} cached and {new} new tokens exceed the cache's capacity "
                f"of {self.capacity}"
            )
        starts = torch.tensor(self.lengths, device=self.latents.device)
        return starts.unsqueeze(1) + torch.arange(new, device=self.latents.device)

    def mask(self, positions: Int[Tensor, "batch new"]) -> Bool[Tensor, "batch new keys"] | None:
        """Which cached tokens each new one sees.

        None for the first tokens of an empty cache, which is plain causality, and for one token of
        equally long rows, which sees all.
        """
        new = positions.shape[1]
        if max(self.lengths) == 0 or (new == 1 and min(self.lengths) == max(self.lengths)):
            return None
        keys = torch.arange(max(self.lengths) + new, device=positions.device)
        return keys <= positions.unsqueeze(-1)

    def append(
        self, layer: int, latent: Float[Tensor, "batch new latent"]
    ) -> Float[Tensor, "batch keys latent"]:
        """Store a layer's new latents and return all of the layer's, up to the longest row."""
        store, new, longest = self.latents.select(0, layer), latent.shape[1], max(self.lengths)
        if min(self.lengths) == longest:
            store.narrow(1, longest, new).copy_(latent)
        else:
            for row, length in enumerate(self.lengths):
                store[row, length : length + new] = latent[row]
        return store.narrow(1, 0, longest + new)

    def advance(self, new: int) -> None:
        self.lengths = [length + new for length in self.lengths]
