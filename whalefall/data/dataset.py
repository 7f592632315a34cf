"""What a prepared data set is: the card ``dataset.json`` in its folder."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from whalefall.config.explain import validated
from whalefall.config.model import Section
from whalefall.errors import UserError
from whalefall.integrity import verify_manifest

Split = Literal["train", "heldout"]

CARD = "dataset.json"


class Recipe(Section):
    """The settings that decide what is written, apart from the texts and the tokenizer."""

    text_field: str
    heldout_fraction: float = Field(ge=0, lt=1)
    fim_rate: float = Field(ge=0, le=1)
    split_rate: float = Field(ge=0, le=1)
    seed: int


class SplitSummary(Section):
    """The size of a split; ``utf8_bytes`` are those of the texts, without special tokens."""

    tokens: int
    documents: int
    utf8_bytes: int


class PreparedSummary(Section):
    """What is in a prepared folder and how it was made."""

    format: Literal[1] = 1
    """Version of the layout of the folder."""
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    """Fingerprint of the tokenizer that wrote the tokens."""
    recipe: Recipe
    train: SplitSummary
    heldout: SplitSummary
    skipped: dict[str, int]
    """Documents left out, counted by reason."""

    def save(self, folder: Path) -> None:
        (folder / CARD).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the card of a prepared folder, after checking that it is as it was written.

        Raises:
            UserError: ``folder`` is no prepared data set, is damaged, or has another layout.
        """
        if not (folder / CARD).is_file():
            raise UserError(f"{folder} is no prepared data set: it has no {CARD}")
        verify_manifest(folder)
        try:
            return validated(cls, json.loads((folder / CARD).read_text()))
        except UserError as error:
            raise UserError(f"{folder / CARD} is of another version: {error}") from None
