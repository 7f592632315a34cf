"""Rows of tokens as a pure function of (seed, row): no iterator, nothing to save or restore."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from whalefall.config.train import SourceConfig
from whalefall.data.dataset import PreparedSummary, Split
from whalefall.data.order import Interleave, permute
from whalefall.data.shards import TokenShards
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows of a rank: ``sequence_length + extra_tokens`` tokens each."""

    tokens: Int[Tensor, "batch row"]
    documents: Int[Tensor, "batch row"] | None
    """With sample masks, a number for each token that differs between documents of a row."""
    document_ids: tuple[str, ...]
    """Names of the documents that the batch holds a part of, sorted; for error reports."""


class Rows:
    """One split of a prepared data set, cut into rows that overlap by ``extra`` tokens.

    Raises:
        UserError: the split is damaged, or shorter than one row.
    """

    def __init__(self, folder: Path, split: Split, length: int, extra: int, verify: bool) -> None:
        self._shards = TokenShards.open(folder / split, verify=verify)
        self._length, self._extra = length, extra
        self.count = (self._shards.num_tokens - extra) // length
        if self.count < 1:
            raise UserError(
                f"{folder / split} has {self._shards.num_tokens} tokens and one row takes "
                f"{length + extra}: shorten data.sequence_length or prepare more text"
            )

    def read(self, row: int) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
        """The tokens of a row, and the number of the document that each is from."""
        start = row * self._length
        stop = start + self._length + self._extra
        tokens = self._shards.tokens(start, stop).astype(np.int64)
        return tokens, self._shards.documents(start, stop)

    def name(self, document: int) -> str:
        return self._shards.name(document)


class Loader:
    """The batches of a mixture of prepared data sets.

    Row r of a source covers its tokens r*S .. r*S + S + extra (S = ``sequence_length``): documents
    are packed without padding, and neighbours overlap by ``extra_tokens`` so that every token has
    its targets, those of multi-token prediction too. Each epoch reads a source's rows in another
    shuffled order; ``order`` says how any row is found without state.

    Args:
        sources: prepared folders and their weights in the mixture.
        sequence_length: tokens of a row that predict.
        extra_tokens: tokens more at the end of a row: one, and one for each depth of MTP.
        seed: decides the orders.
        sample_masks: give ``Batch.documents``, so that attention can stay inside documents.
        split: ``train`` or ``heldout``.
        verify: compare the checksums of the split's files at the start.

    Raises:
        UserError: no source is named, a folder is no prepared data set or is damaged, tokenizers
            differ, or a source is shorter than one row.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        sequence_length: int,
        extra_tokens: int,
        seed: int,
        sample_masks: bool = False,
        split: Split = "train",
        verify: bool = True,
    ) -> None:
        if not sources:
            raise UserError("data.sources is empty; name at least one prepared data set")
        self._folders = [source.path for source in sources]
        cards = [PreparedSummary.load(folder) for folder in self._folders]
        for folder, card in zip(self._folders, cards, strict=True):
            if card.tokenizer != cards[0].tokenizer:
                raise UserError(
                    f"{folder} and {self._folders[0]} were prepared with different tokenizers; "
                    "prepare one with the tokenizer of the other"
                )
        self.vocab_size = cards[0].vocab_size
        self._row = (sequence_length, extra_tokens)
        self._seed = seed
        self._sample_masks = sample_masks
        self._verify = verify
        self._mixture = Interleave([source.weight for source in sources])
        self._streams = self._open(split)

    def batch(self, first_row: int, rows: int, *, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of the rows [first_row, first_row + rows): every ``world``-th one."""
        chosen = range(first_row + rank, first_row + rows, world)
        return self._read(self._streams, [self._shuffled(row) for row in chosen])

    def held_out(self, rows: int) -> Batch:
        """The first rows of the held-out split in order, or all where there are fewer.

        Raises:
            UserError: a source's held-out split is damaged, or shorter than one row.
        """
        streams = self._heldout
        rows = min(rows, sum(stream.count for stream in streams))
        mixed = map(self._mixture.locate, count())
        there = (place for place in mixed if place[1] < streams[place[0]].count)
        return self._read(streams, list(islice(there, rows)))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._folders[0])

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens that predict in all rows of all sources, each counted once."""
        return sum(stream.count for stream in self._streams) * self._row[0]

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Check that a model has an embedding for every token.

        Raises:
            UserError: it has fewer than the tokenizer has tokens.
        """
        if model_vocab_size < self.vocab_size:
            raise UserError(
                f"model.vocab_size is {model_vocab_size}, but the data's tokenizer has "
                f"{self.vocab_size} tokens; the model needs at least as many"
            )

    @cached_property
    def _heldout(self) -> list[Rows]:
        return self._open("heldout")

    def _open(self, split: Split) -> list[Rows]:
        return [Rows(folder, split, *self._row, self._verify) for folder in self._folders]

    def _shuffled(self, row: int) -> tuple[int, int]:
        """(source, row of the source) for a row of the training stream."""
        source, index = self._mixture.locate(row)
        size = self._streams[source].count
        epoch, place = divmod(index, size)
        return source, permute(place, size, "rows", self._seed, source, epoch)

    def _read(self, streams: Sequence[Rows], places: Sequence[tuple[int, int]]) -> Batch:
        shape = (len(places), sum(self._row))
        tokens, documents = np.empty(shape, np.int64), np.empty(shape, np.int64)
        names: set[str] = set()
        for position, (source, row) in enumerate(places):
            tokens[position], documents[position] = streams[source].read(row)
            names.update(map(streams[source].name, np.unique(documents[position]).tolist()))
        masks = torch.from_numpy(documents) if self._sample_masks else None
        return Batch(torch.from_numpy(tokens), masks, tuple(sorted(names)))
