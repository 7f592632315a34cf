"""Tokens kept apart: the same line, the same network, and rows that know nothing of one another."""

import pytest
import torch

from whalefall.config.model import ModelConfig
from whalefall.model.cache import CachedStep, LatentCache, Rows
from whalefall.model.inference import make_invariant
from whalefall.model.invariance import Invariance
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE


def groups() -> list[Rows]:
    """Two rows of three tokens, one of which goes over a page's end; and a prompt's chunk."""
    pages = torch.tensor([[1, 2], [3, 4], [5, 0]], dtype=torch.int32)
    lengths = torch.tensor([62, 5, 0], dtype=torch.int32)
    return [Rows(3, lengths[:2], pages[:2]), Rows(40, lengths[2:], pages[2:], cached=0)]


def cache_of(network: Transformer) -> LatentCache:
    return LatentCache(network.config, 6, network.rotation(torch.arange(2 * PAGE)), mtp=True)


@pytest.mark.parametrize("block_rows", [None, 16])
def test_tokens_stay_where_they_are(tiny_config: ModelConfig, block_rows: int | None) -> None:
    cache = cache_of(Transformer.create(tiny_config))
    apart = list(Invariance(512, block_rows).apart(groups()))
    assert all(rows.width == 1 and rows.cached is None for rows in apart)
    assert all(rows.split_keys == 512 for rows in apart)
    assert [rows.tokens for rows in apart] == ([1] * 46 if block_rows is None else [6, 40])
    step, right = (CachedStep.of(cache, rows, heads=4) for rows in (apart, groups()))
    assert torch.equal(step.slots, right.slots)
    assert torch.equal(step.rotation, right.rotation)


def test_many_tokens_share_the_memory_of_few() -> None:
    [_, chunk] = groups()
    long = Rows(600, chunk.lengths, chunk.pages)
    assert [rows.tokens for rows in Invariance(512, 16).apart([long])] == [256, 256, 88]


@torch.inference_mode()
def test_the_network_is_the_same(tiny_config: ModelConfig) -> None:
    """Its tokens, its drafts and its logits."""
    network = Transformer.create(tiny_config)
    line = torch.randint(tiny_config.vocab_size, (46,))
    found = []
    for _ in range(2):
        step = network.cached_step(cache_of(network), groups())
        hidden = network.decode(line, step)
        draft = network.draft(0, hidden, line.roll(-1), step)
        found.append((hidden, draft, network.head(draft), network.head(hidden[:0])))
        make_invariant(network)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_network_that_trains_is_left_alone(tiny_config: ModelConfig) -> None:
    network, plain = (Transformer.create(tiny_config) for _ in range(2))
    make_invariant(network)
    tokens = torch.randint(tiny_config.vocab_size, (2, 9))
    logits = network(tokens).logits
    assert torch.equal(logits, plain(tokens).logits)
    assert logits.requires_grad


@pytest.mark.parametrize(("context", "split"), [(64, 512), (8192, 512), (163840, 10240)])
def test_the_longest_context_is_in_few_pieces(
    tiny_config: ModelConfig, context: int, split: int
) -> None:
    config = tiny_config.model_copy(update={"max_position_embeddings": context})
    network = Transformer.create(config)
    make_invariant(network)
    assert network.invariance is not None and network.invariance.split_keys == split
