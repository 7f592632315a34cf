"""A small tokenizer and a small prepared data set, made once from the sources of ``json``."""

import json
from pathlib import Path

import pytest
from hypothesis import settings

from whalefall.data.prepare import prepare
from whalefall.data.sources import Document
from whalefall.data.tokenizer import Tokenizer

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SOURCES = Path(json.__file__).parent


@pytest.fixture(scope="session")
def corpus() -> list[Document]:
    """About 60 short documents of Python."""
    blocks = [
        block
        for path in sorted(SOURCES.glob("*.py"))
        for block in path.read_text(encoding="utf-8").split("\n\n\n")
    ]
    return [Document(f"block/{number}", text) for number, text in enumerate(blocks)]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[Document]) -> Tokenizer:
    return Tokenizer.train((document.text for document in corpus), 600)


@pytest.fixture(scope="session")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[Document], tokenizer: Tokenizer
) -> Path:
    """Many shards, and a fifth of the documents held out."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare(corpus, folder, tokenizer=tokenizer, heldout_fraction=0.2, shard_tokens=1000)
    return folder
