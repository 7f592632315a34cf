"""Bits per byte against its definition."""

import math

import pytest
import torch

from whalefall.config.model import ModelConfig
from whalefall.errors import UserError
from whalefall.model.transformer import Transformer
from whalefall.train.evaluate import bits_per_byte


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    return Transformer.create(tiny_config, seed=1)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(0, 128, (7, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def token_bytes() -> torch.Tensor:
    """Specials 0 to 9; the others stand for one to four bytes."""
    sizes = torch.arange(128) % 4 + 1
    sizes[:10] = 0
    return sizes


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_definition(
    model: Transformer, rows: torch.Tensor, token_bytes: torch.Tensor, rows_at_once: int
) -> None:
    with torch.no_grad():
        logs = model(rows[:, :-1]).logits.double().log_softmax(-1)
    nats = text = 0.0
    for row in range(7):
        for place in range(11):
            token = rows[row, place + 1]
            if token_bytes[token]:
                nats -= logs[row, place, token].item()
                text += token_bytes[token].item()
    found = bits_per_byte(model, rows, token_bytes, rows_at_once=rows_at_once)
    assert found == pytest.approx(nats / text / math.log(2), rel=1e-5)


def test_first_tokens_of_documents_are_not_scored_when_documents_are_apart(
    model: Transformer, rows: torch.Tensor, token_bytes: torch.Tensor
) -> None:
    """Two halves as documents of one row, or as rows of their own: the same number."""
    documents = torch.arange(12).ge(6).long().expand(7, 12).contiguous()
    packed = bits_per_byte(model, rows, token_bytes, documents=documents)
    alone = bits_per_byte(model, torch.cat([rows[:, :6], rows[:, 6:]]), token_bytes)
    assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_given_back(
    model: Transformer, rows: torch.Tensor, token_bytes: torch.Tensor, training: bool
) -> None:
    model.train(training)
    bits_per_byte(model, rows, token_bytes)
    assert model.training == training


def test_rows_without_text(model: Transformer, token_bytes: torch.Tensor) -> None:
    with pytest.raises(UserError, match="no text"):
        bits_per_byte(model, torch.ones(2, 5, dtype=torch.int64), token_bytes)
