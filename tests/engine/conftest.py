"""A tokenizer of single bytes, so that every character beyond ASCII is split, and its network."""

import pytest

from whalefall.config.model import ModelConfig
from whalefall.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from whalefall.model.transformer import Transformer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([], SMALLEST_VOCABULARY)


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    """Weights large enough that what it writes varies."""
    shape = {"vocab_size": SMALLEST_VOCABULARY, "initializer_range": 0.4}
    return Transformer.create(tiny_config.model_copy(update=shape))
