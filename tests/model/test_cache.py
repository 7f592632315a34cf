"""The latent cache: decoding in any steps, of any lengths, is the forward pass."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig, RopeScaling
from whalefall.errors import UserError
from whalefall.model.attention import LatentAttention
from whalefall.model.cache import LatentCache, bytes_per_token, multi_head_bytes_per_token
from whalefall.model.transformer import Transformer

LENGTH = 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    return Transformer.create(tiny_config, dtype=torch.float64).requires_grad_(False)


def tokens(batch: int) -> Tensor:
    return torch.randint(128, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def cache_for(model: Transformer, batch: int, capacity: int = LENGTH) -> LatentCache:
    return LatentCache(model.config, batch, capacity, dtype=torch.float64)


def expected(model: Transformer, rows: Tensor) -> Tensor:
    return model.hidden_states(rows, with_mtp=False).main


def test_bytes_of_v3() -> None:
    """576 numbers of two bytes in 61 layers; plain heads keep 2 * 128 * 128, 56.9 times as many."""
    config = ModelConfig()
    assert bytes_per_token(config) == 70_272
    assert bytes_per_token(config, torch.float32) == 2 * 70_272
    assert multi_head_bytes_per_token(config) == 61 * 2 * 128 * 128 * 2


def test_memory_is_what_bytes_per_token_says(tiny_config: ModelConfig) -> None:
    cache = LatentCache(tiny_config, 3, 7, dtype=torch.bfloat16)
    allocated = cache.latents.numel() * cache.latents.element_size()
    assert allocated == 3 * 7 * bytes_per_token(tiny_config, torch.bfloat16)
    assert cache.capacity == 7


@pytest.mark.parametrize("steps", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11], [11, 1]])
def test_decoding_in_steps_is_the_forward(model: Transformer, steps: list[int]) -> None:
    rows, cache, parts = tokens(2), cache_for(model, 2), []
    for part in rows.split(steps, 1):
        parts.append(model.decode(part, cache))
    torch.testing.assert_close(torch.cat(parts, 1), expected(model, rows), **CLOSE)
    assert list(cache.lengths) == [LENGTH, LENGTH]


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_scaling": RopeScaling(original_max_position_embeddings=8)},
    ],
    ids=["plain query", "yarn"],
)
def test_decoding_other_networks(tiny_config: ModelConfig, changes: dict[str, object]) -> None:
    config = tiny_config.model_copy(update=changes)
    model = Transformer.create(config, dtype=torch.float64).requires_grad_(False)
    rows, cache = tokens(2), cache_for(model, 2)
    parts = [model.decode(part, cache) for part in rows.split([4, 1, 5, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected(model, rows), **CLOSE)


def test_a_prompt_is_bit_equal_to_the_forward(model: Transformer) -> None:
    """The same causal kernel, so that not one expert is chosen differently."""
    low = Transformer.create(model.config, dtype=torch.bfloat16).requires_grad_(False)
    cache = LatentCache(low.config, 2, LENGTH, dtype=torch.bfloat16)
    assert torch.equal(low.decode(tokens(2), cache), expected(low, tokens(2)))


def test_a_step_takes_the_form_that_multiplies_less(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per key and head, expansion costs 64 (2 + 2) products; absorption 2 * 64 - 4 more a query.

    So three queries are worth an expansion here, and both forms continue the same cache.
    """
    changes = {"kv_lora_rank": 64, "qk_nope_head_dim": 2, "v_head_dim": 2}
    model = Transformer.create(tiny_config.model_copy(update=changes), dtype=torch.float64)
    forms: list[str] = []
    for form in ("absorbed", "expanded"):
        plain = getattr(LatentAttention, form)

        def noted(*args: Any, form: str = form, plain: Any = plain) -> Tensor:
            forms.append(form)
            return plain(*args)

        monkeypatch.setattr(LatentAttention, form, noted)
    rows, cache, parts, taken = tokens(2), cache_for(model, 2), [], []
    with torch.no_grad():
        for part in rows.split([4, 2, 1, 3, 2], 1):
            parts.append(model.decode(part, cache))
            taken.append(set(forms))
            forms.clear()
    assert taken == [{"expanded"}, {"absorbed"}, {"absorbed"}, {"expanded"}, {"absorbed"}]
    torch.testing.assert_close(torch.cat(parts, 1), expected(model, rows), **CLOSE)


def test_rows_of_unequal_length_decode_together(model: Transformer) -> None:
    """Each prompt goes into its own row; from then on they step together, one or more tokens."""
    rows, cache, prompts = tokens(3), cache_for(model, 3), [2, 7, 4]
    for index, length in enumerate(prompts):
        row = cache.row(index)
        model.decode(rows[index : index + 1, :length], row)
        cache.lengths[index] = row.lengths[0]
    for new in (1, 3, 1):
        starts = list(cache.lengths)
        step = torch.stack([row[s : s + new] for row, s in zip(rows, starts, strict=True)])
        hidden = model.decode(step, cache)
        for index, start in enumerate(starts):
            right = expected(model, rows[index : index + 1, : start + new])[0, start:]
            torch.testing.assert_close(hidden[index], right, **CLOSE)
    assert list(cache.lengths) == [7, 12, 9]


def test_what_lies_beyond_a_row_is_never_read(model: Transformer) -> None:
    """Room left by a longer or an earlier sequence holds numbers; none of them may matter."""
    rows, clean, dirty = tokens(2), cache_for(model, 2), cache_for(model, 2)
    dirty.latents.normal_(std=100.0)
    for cache in (clean, dirty):
        model.decode(rows[1:, :6], row := cache.row(1))
        cache.lengths[1] = row.lengths[0]
    step = torch.stack([rows[0, :3], rows[1, 6:9]])
    assert torch.equal(model.decode(step, clean), model.decode(step, dirty))


def test_a_row_shares_memory_and_not_length(model: Transformer) -> None:
    rows, cache = tokens(2), cache_for(model, 2)
    row = cache.row(1)
    model.decode(rows[:1, :5], row)
    assert list(row.lengths) == [5] and list(cache.lengths) == [0, 0]
    assert (cache.latents[:, 1, :5] != 0).any(-1).all()
    assert (cache.latents[:, 0] == 0).all() and (cache.latents[:, 1, 5:] == 0).all()


def test_every_layer_keeps_its_own_latents(model: Transformer) -> None:
    cache = cache_for(model, 1)
    model.decode(tokens(1), cache)
    layers = cache.latents[:, 0]
    assert len(layers) == model.config.num_hidden_layers
    assert all(not torch.allclose(a, b) for a, b in pairwise(layers))


def test_too_many_tokens_are_refused_before_anything_is_written(model: Transformer) -> None:
    cache = cache_for(model, 2, capacity=6)
    model.decode(tokens(2)[:, :4], cache)
    before = cache.latents.clone()
    with pytest.raises(UserError, match="4 cached and 3 new tokens exceed"):
        model.decode(tokens(2)[:, 4:7], cache)
    assert torch.equal(cache.latents, before) and list(cache.lengths) == [4, 4]
    model.decode(tokens(2)[:, 4:6], cache)  # and what fits still goes on
