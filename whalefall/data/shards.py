"""Tokens on disk: memory-mapped shards that know which document every token came from.

A folder of shards holds, for shard ``00000``: ``00000.tokens`` (the tokens, little-endian),
``00000.names`` (the documents' names, UTF-8, back to back) and ``00000.index`` (for each document
where its tokens and its name end in those two, int64). ``shards.json`` lists them.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Int, UInt

from whalefall.errors import UserError
from whalefall.integrity import verify_manifest, write_manifest

LISTING = "shards.json"
# Each map holds a file descriptor, and a corpus has more shards than a process may open files.
_OPEN_SHARDS = 64


class Shard(NamedTuple):
    """Sizes of one shard; ``name_bytes`` is the length of all its documents' names."""

    name: str
    tokens: int
    documents: int
    name_bytes: int


class ShardWriter:
    """Appends documents to the shards of ``folder``; whole documents, one shard in memory.

    Args:
        folder: created when missing.
        dtype: unsigned type that holds every token id.
        shard_tokens: a shard is closed by the document that reaches this size.
    """

    def __init__(self, folder: Path, *, dtype: str, shard_tokens: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._start_shard()

    def add(self, name: str, ids: UInt[np.ndarray, " tokens"]) -> None:
        raw_name = name.encode()
        self._tokens.append(ids)
        self._names.append(raw_name)
        self._num_tokens += len(ids)
        self._name_bytes += len(raw_name)
        self._ends.append((self._num_tokens, self._name_bytes))
        if self._num_tokens >= self._shard_tokens:
            self._write_shard()

    def close(self) -> list[Shard]:
        """Write what is left, the listing and the checksums."""
        if self._tokens:
            self._write_shard()
        listing = {
            "dtype": self._dtype.name,
            "shards": [shard._asdict() for shard in self._shards],
        }
        (self._folder / LISTING).write_text(json.dumps(listing, indent=2) + "\n")
        write_manifest(self._folder, [path.name for path in self._folder.iterdir()])
        return self._shards

    def _start_shard(self) -> None:
        self._tokens: list[UInt[np.ndarray, " tokens"]] = []
        self._names: list[bytes] = []
        self._ends: list[tuple[int, int]] = []
        self._num_tokens = self._name_bytes = 0

    def _write_shard(self) -> None:
        name = f"{len(self._shards):05d}"
        with (self._folder / f"{name}.tokens").open("wb") as file:
            for ids in self._tokens:
                file.write(ids.astype(self._dtype, copy=False).tobytes())
        (self._folder / f"{name}.names").write_bytes(b"".join(self._names))
        (self._folder / f"{name}.index").write_bytes(np.array(self._ends, dtype="<i8").tobytes())
        self._shards.append(Shard(name, self._num_tokens, len(self._ends), self._name_bytes))
        self._start_shard()


class TokenShards:
    """One split of a prepared data set as a single array of tokens, read from disk on demand."""

    def __init__(self, folder: Path, dtype: str, shards: list[Shard]) -> None:
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards = shards
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)])
        self._tokens = lru_cache(_OPEN_SHARDS)(self._map_tokens)
        self._index = lru_cache(_OPEN_SHARDS)(self._map_index)

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Self:
        """Open a folder that ``ShardWriter`` wrote.

        Args:
            folder: ``train`` or ``heldout`` of a prepared data set.
            verify: read every file once and compare checksums (about a second per GB); sizes are
                compared in any case.

        Raises:
            UserError: a file is missing, truncated or damaged; the message names the first one.
        """
        if verify:
            verify_manifest(folder)
        try:
            listing = json.loads((folder / LISTING).read_text())
            shards = cls(folder, listing["dtype"], [Shard(**entry) for entry in listing["shards"]])
        except FileNotFoundError:
            raise UserError(f"{folder} holds no token shards: {LISTING} is missing") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder / LISTING} is damaged: it lists no shards") from None
        shards._check_sizes()
        return shards

    @property
    def num_tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._document_starts[-1])

    def tokens(self, start: int, stop: int) -> UInt[np.ndarray, " tokens"]:
        """A copy of the tokens [start, stop), which may lie in several shards."""
        pieces = [self._tokens(shard)[a:b] for shard, a, b in self._pieces(start, stop)]
        return np.concatenate([np.empty(0, self._dtype), *pieces])

    def documents(self, start: int, stop: int) -> Int[np.ndarray, " tokens"]:
        """The number, in this split, of the document of each token in [start, stop)."""
        numbers = [np.empty(0, np.int64)]
        for shard, a, b in self._pieces(start, stop):
            ends = self._index(shard)[:, 0]
            local = np.searchsorted(ends, np.arange(a, b), side="right")
            numbers.append(local + self._document_starts[shard])
        return np.concatenate(numbers)

    def name(self, document: int) -> str:
        """The name of the document with this number."""
        shard = int(np.searchsorted(self._document_starts, document, side="right")) - 1
        ends = self._index(shard)[:, 1]
        local = document - int(self._document_starts[shard])
        start = int(ends[local - 1]) if local else 0
        with self._path(shard, "names").open("rb") as file:
            file.seek(start)
            return file.read(int(ends[local]) - start).decode()

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The shards that [start, stop) touches, with the range inside each."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens}")
        first = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._token_starts, stop, side="left"))
        pieces = []
        for shard in range(first, last):
            begin, end = self._token_starts[shard : shard + 2].tolist()
            pieces.append((shard, max(start, begin) - begin, min(stop, end) - begin))
        return pieces

    def _map_tokens(self, shard: int) -> UInt[np.ndarray, " tokens"]:
        return np.memmap(self._path(shard, "tokens"), self._dtype, mode="r")

    def _map_index(self, shard: int) -> Int[np.ndarray, "documents 2"]:
        return np.memmap(self._path(shard, "index"), "<i8", mode="r").reshape(-1, 2)

    def _path(self, shard: int, kind: str) -> Path:
        return self._folder / f"{self._shards[shard].name}.{kind}"

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self._shards):
            expected = {
                "tokens": shard.tokens * self._dtype.itemsize,
                "index": shard.documents * 16,
                "names": shard.name_bytes,
            }
            for kind, size in expected.items():
                path = self._path(number, kind)
                found = path.stat().st_size if path.is_file() else 0
                if found != size:
                    raise UserError(f"{path} has {found} bytes instead of {size}")
