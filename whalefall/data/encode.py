"""Texts to tokens, as a function of each document alone."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt

from whalefall.data.dataset import Recipe, Split
from whalefall.data.draws import generator
from whalefall.data.fim import fim_ids, joined_tokens, plain_ids, split_joined
from whalefall.data.selection import Text
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError

_CHUNK_CHARACTERS = 2**18


class Encoded(NamedTuple):
    """A document as it goes to disk, and the UTF-8 bytes of its text."""

    name: str
    split: Split
    ids: UInt[np.ndarray, " tokens"]
    utf8_bytes: int


class Encoder:
    """Encodes documents by a recipe; what a document becomes depends on its name and text only.

    Held-out documents stay plain, so that their loss is the loss of the text.

    Raises:
        UserError: the recipe asks for fill-in-the-middle, which the tokenizer has no tokens for.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        if recipe.fim_rate and tokenizer.fim_ids is None:
            raise UserError(
                f"fim_rate is {recipe.fim_rate}, but the tokenizer has no fill-in-the-middle "
                "tokens: set it to 0"
            )
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._joined = joined_tokens(tokenizer)
        self.dtype: Literal["uint16", "uint32"] = (
            "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        )

    def encode(self, document: Text) -> Encoded:
        recipe, text = self._recipe, document.text
        if document.split == "heldout":
            ids = plain_ids(self._tokenizer, text)
        else:
            rng = generator("document", recipe.seed, document.name)
            if rng.random() < recipe.fim_rate:
                ids = fim_ids(self._tokenizer, text, rng)
            else:
                ids = plain_ids(self._tokenizer, text)
            ids = split_joined(ids, self._joined, rng, recipe.split_rate)
        array = np.array(ids, dtype=self.dtype)
        return Encoded(document.name, document.split, array, len(text.encode()))

    def encode_all(self, documents: Iterable[Text], workers: int | None) -> Iterator[Encoded]:
        """Encode in ``workers`` threads (None: one a core) and in order, a few chunks ahead.

        Threads, not processes: nearly all of the time is spent in the tokenizer, which lets other
        threads run, and threads neither copy texts nor fork a process that uses torch.
        """
        workers = workers or os.cpu_count() or 1
        pending: deque[Future[list[Encoded]]] = deque()
        pool = ThreadPoolExecutor(workers)
        try:
            for chunk in _chunks(documents):
                pending.append(pool.submit(self._encode_chunk, chunk))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode_chunk(self, chunk: list[Text]) -> list[Encoded]:
        return [self.encode(document) for document in chunk]


def _chunks(documents: Iterable[Text]) -> Iterator[list[Text]]:
    """Runs of documents long enough that handing them to a thread costs nothing beside them."""
    chunk: list[Text] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
