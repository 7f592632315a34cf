"""The latent cache: decoding in any steps, over any pages, is the forward pass."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig, RopeScaling
from whalefall.model.cache import (
    LatentCache,
    Rows,
    bytes_per_token,
    multi_head_bytes_per_token,
)
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE, decode_latents

LENGTH = 2 * PAGE + 9
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    return Transformer.create(tiny_config, dtype=torch.float64).requires_grad_(False)


def tokens(batch: int) -> Tensor:
    return torch.randint(128, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def expected(model: Transformer, rows: Tensor) -> Tensor:
    return model.hidden_states(rows, with_mtp=False).main


class Sequences:
    """Sequences that go on by given numbers of tokens, their pages scattered over the cache."""

    def __init__(self, model: Transformer, rows: Tensor, *, mtp: bool = False, fp8: bool = False):
        self.model, self.rows, self.lengths = model, rows, [0] * len(rows)
        positions = torch.arange(rows.shape[1] + PAGE)
        rotation = model.rotation(positions)
        count, dtype = -(-rows.shape[1] // PAGE), model.lm_head.weight.dtype
        pages = 2 + count * len(rows)
        self.cache = LatentCache(model.config, pages, rotation, mtp=mtp, dtype=dtype, fp8=fp8)
        order = torch.randperm(count * len(rows), generator=torch.Generator().manual_seed(1))
        self.pages = order.view(len(rows), count).int() + 1

    def go_on(self, *groups: tuple[Sequence[int], int], known: bool = True) -> list[Tensor]:
        """Each group's sequences by so many tokens, in one step; what each of them gives."""
        line, parts = [], []
        for members, width in groups:
            lengths = [self.lengths[member] for member in members]
            cached = lengths[0] if known and len(set(lengths)) == 1 else None
            starts = torch.tensor(lengths, dtype=torch.int32)
            line.append(Rows(width, starts, self.pages[list(members)], cached))
            for member, length in zip(members, lengths, strict=True):
                parts.append(self.rows[member, length : length + width])
                self.lengths[member] += width
        step = self.model.cached_step(self.cache, line)
        hidden = self.model.decode(torch.cat(parts), step)
        return list(hidden.split([len(part) for part in parts]))


def test_bytes_of_v3() -> None:
    """576 numbers of two bytes in 61 layers; plain heads keep 2 * 128 * 128, 56.9 times as many."""
    config = ModelConfig()
    assert bytes_per_token(config) == 70_272
    assert bytes_per_token(config, torch.float32) == 2 * 70_272
    assert bytes_per_token(config, fp8=True) == 61 * 656
    assert multi_head_bytes_per_token(config) == 61 * 2 * 128 * 128 * 2


def test_memory_is_what_bytes_per_token_says(model: Transformer) -> None:
    config = model.config
    cache = LatentCache(config, 3, model.rotation(torch.arange(9)), dtype=torch.bfloat16)
    assert cache.latents.nbytes == 3 * PAGE * bytes_per_token(config, torch.bfloat16)
    fp8 = LatentCache(config, 3, cache.rotation, dtype=torch.bfloat16, fp8=True)
    assert fp8.latents.nbytes == 3 * PAGE * bytes_per_token(config, fp8=True)
    with_mtp = LatentCache(config, 3, cache.rotation, mtp=True, dtype=torch.bfloat16)
    layers = config.num_hidden_layers
    assert with_mtp.latents.nbytes * layers == cache.latents.nbytes * (layers + 1)


@pytest.mark.parametrize("steps", [[LENGTH], [3] * 45 + [2], [70, 1, 1, 64, 1], [1, 136], [136, 1]])
@pytest.mark.parametrize("known", [True, False])
def test_decoding_in_steps_is_the_forward(
    model: Transformer, steps: list[int], known: bool
) -> None:
    sequences, parts = Sequences(model, tokens(2)), [[], []]
    for width in steps:
        for part, hidden in zip(parts, sequences.go_on(([0, 1], width), known=known), strict=True):
            part.append(hidden)
    found = torch.stack([torch.cat(part) for part in parts])
    torch.testing.assert_close(found, expected(model, tokens(2)), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_scaling": RopeScaling(original_max_position_embeddings=8)},
        {"attention_bias": True},
    ],
    ids=["plain query", "yarn", "bias"],
)
def test_decoding_other_networks(tiny_config: ModelConfig, changes: dict[str, object]) -> None:
    config = tiny_config.model_copy(update=changes)
    model = Transformer.create(config, dtype=torch.float64).requires_grad_(False)
    if config.attention_bias:
        for block in model.blocks:
            torch.nn.init.normal_(block.self_attn.kv_a_proj_with_mqa.bias, std=0.3)
    sequences = Sequences(model, tokens(1))
    parts = [sequences.go_on(([0], width))[0] for width in (4, 1, 120, 1, 11)]
    torch.testing.assert_close(torch.cat(parts)[None], expected(model, tokens(1)), **CLOSE)


def test_groups_of_any_width_share_a_step(model: Transformer) -> None:
    """Decoding rows beside prompts from their beginning and prompts that go on."""
    sequences, right = Sequences(model, tokens(4)), expected(model, tokens(4))
    sequences.go_on(([0], 2))
    sequences.go_on(([1], 70))
    sequences.go_on(([2], 5))
    found = sequences.go_on(([0, 1], 3), ([3], 20), ([2], 66))  # the last two expand
    for hidden, row, start in zip(found, (0, 1, 3, 2), (2, 70, 0, 5), strict=True):
        torch.testing.assert_close(hidden, right[row, start : start + len(hidden)], **CLOSE)


def test_long_chunks_expand_and_short_ones_absorb(tiny_config: ModelConfig) -> None:
    """Per key and head, expansion costs 64 (2 + 2) products; absorption 2 * 64 - 4 more a query.

    So three queries are worth an expansion here; at a prompt's beginning it costs nothing.
    """
    changes = {"kv_lora_rank": 64, "qk_nope_head_dim": 2, "v_head_dim": 2}
    model = Transformer.create(tiny_config.model_copy(update=changes))
    assert [model.expands(70, new) for new in (1, 2, 3, 125)] == [False, False, True, True]
    assert model.expands(0, 1)


def test_what_lies_beyond_a_sequence_is_never_read(model: Transformer) -> None:
    """Pages hold what others left; none of it may matter."""
    clean, dirty = Sequences(model, tokens(2)), Sequences(model, tokens(2))
    dirty.cache.latents.normal_(std=100.0)
    for sequences in (clean, dirty):
        sequences.go_on(([1], 66))
    for right, found in zip(clean.go_on(([0, 1], 3)), dirty.go_on(([0, 1], 3)), strict=True):
        assert torch.equal(right, found)


def test_only_a_sequences_own_pages_are_written(model: Transformer) -> None:
    sequences = Sequences(model, tokens(2))
    sequences.go_on(([1], PAGE + 1))
    written = (sequences.cache.latents != 0).any(-1).sum((0, 2)).tolist()
    layers = model.config.num_hidden_layers
    first, second = sequences.pages[1, :2].tolist()
    assert written[first] == layers * PAGE and written[second] == layers
    assert sum(written) == layers * (PAGE + 1)


def test_every_layer_keeps_its_own_latents(model: Transformer) -> None:
    sequences = Sequences(model, tokens(1))
    sequences.go_on(([0], LENGTH))
    layers = sequences.cache.latents[:, sequences.pages[0, 0]]
    assert all(not torch.allclose(a, b) for a, b in pairwise(layers))


def test_an_fp8_cache_holds_the_same_in_bytes(model: Transformer) -> None:
    """In all layers, MTP's too; E4M3 moves a number by 1/16 at most, and later layers see that."""
    plain, fp8 = (Sequences(model, tokens(2), mtp=True, fp8=fp8) for fp8 in (False, True))
    for sequences in (plain, fp8):
        lengths = torch.zeros(2, dtype=torch.int32)
        group = Rows(LENGTH, lengths, sequences.pages, cached=0)
        step = model.cached_step(sequences.cache, [group])
        hidden = model.decode(sequences.rows.flatten(), step)
        model.draft(0, hidden, sequences.rows.roll(-1, 1).flatten(), step)
    found = decode_latents(fp8.cache.latents.flatten(0, 2), model.config.kv_lora_rank)
    for own, right in zip(found.view_as(plain.cache.latents), plain.cache.latents, strict=True):
        assert 0 < (own - right).norm() < right.norm() / 16
        assert torch.equal(own == 0, right == 0)


def test_drafts_continue_what_mtp_does_in_training(model: Transformer) -> None:
    """The module over a cache, in steps, gives what it gives over the whole sequence."""
    rows = tokens(1)
    states = model.hidden_states(rows)
    sequences, parts, start = Sequences(model, rows, mtp=True), [], 0
    for width in (70, 1, 3, LENGTH - 75):
        lengths = torch.tensor([start], dtype=torch.int32)
        group = Rows(width, lengths, sequences.pages, cached=start)
        step = model.cached_step(sequences.cache, [group])
        hidden = model.decode(rows[0, start : start + width], step)
        following = rows[0, start + 1 : start + 1 + width]
        parts.append(model.draft(0, hidden, following, step))
        start += width
    torch.testing.assert_close(torch.cat(parts)[None], states.mtp[0], **CLOSE)
