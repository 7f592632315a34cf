"""Which documents are held out, and which the tokenizer learns from."""

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from whalefall.data.dataset import Split
from whalefall.data.draws import draw
from whalefall.data.sources import Document


class Text(NamedTuple):
    """The text of a document, its name, and the split it goes to."""

    name: str
    text: str
    split: Split


def assign_splits(documents: Iterable[Document], fraction: float, seed: int) -> Iterator[Text]:
    """Send about ``fraction`` of the documents to ``heldout``, decided by seed and name.

    So a document stays where it is when others come and go. Two exceptions keep small data usable:
    the first document is always for training, and when chance holds out none (and ``fraction``
    is not 0), the one nearest to being held out is; it waits here until that is known.
    """
    found = fraction == 0
    nearest: tuple[float, Document] | None = None
    for number, document in enumerate(documents):
        chance = draw("heldout", seed, document.name)
        if number == 0 or (found and chance >= fraction):
            yield Text(*document, "train")
        elif chance < fraction:
            found = True
            yield Text(*document, "heldout")
        elif nearest is None:
            nearest = (chance, document)
        else:
            nearest, (_, further) = sorted([nearest, (chance, document)])
            yield Text(*further, "train")
    if nearest is not None:
        yield Text(*nearest[1], "train" if found else "heldout")


def sample_texts(texts: Iterable[Text], limit: int, seed: int) -> list[str]:
    """A random sample of the training texts, of about ``limit`` characters at most.

    Keeps the texts with the lowest draws, so that it needs one pass and no more memory than the
    sample, and every text has the same chance.
    """
    sample: list[tuple[float, str]] = []  # a heap with the highest draw first
    size = 0
    for name, text, split in texts:
        if split == "train":
            text = text[:limit]
            heapq.heappush(sample, (-draw("sample", seed, name), text))
            size += len(text)
            while size > limit:
                size -= len(heapq.heappop(sample)[1])
    return [text for _, text in sample]
