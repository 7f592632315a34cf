"""The cache in FP8: an engine does what it does otherwise, with latents that are rounded.

Networks are in float64 where tokens are compared: there an order of sums cannot decide which of two
numbers of E4M3 is nearer.
"""

import random
from functools import cache

import pytest
import torch
from torch import Tensor

from whalefall.config.engine import EngineConfig
from whalefall.config.explain import validated
from whalefall.config.load import apply_override
from whalefall.config.model import ModelConfig
from whalefall.config.serve import ServeConfig
from whalefall.engine.engine import Engine
from whalefall.engine.memory import pages_that_fit
from whalefall.engine.request import Request
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.model import attention
from whalefall.model.linear import Linear
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE, decode_latents, encode_latents
from whalefall.ops.mla_heads import mla_heads
from whalefall.ops.rope import rotate

NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=0)


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """Two tiles a latent, the second in part; weights large enough that texts vary."""
    changes = {"kv_lora_rank": 132, "initializer_range": 0.3, "max_position_embeddings": 256}
    return tiny_config.model_copy(update=changes)


@cache
def prompts() -> list[list[int]]:
    """On both sides of pages; some begin as others do."""
    draw = random.Random(0)
    shared = [draw.randrange(128) for _ in range(150)]
    fresh = [[draw.randrange(128) for _ in range(n)] for n in (1, 63, 64, 90)]
    return [*fresh, shared, *(shared[:n] + [draw.randrange(128)] * 3 for n in (64, 70, 128))]


def logprobs_by_hand(
    model: Transformer, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Of every next token: the whole network at once, each layer's latents rounded as it goes."""

    rank = model.config.kv_lora_rank

    def rounded(latent: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        entry = torch.cat([latent, key], -1)
        entry = decode_latents(encode_latents(entry[0], rank), rank, entry.dtype)[None]
        return entry[..., :rank], entry[..., rank:]

    def round_latent(_: Linear, inputs: tuple[Tensor]) -> Tensor:
        (latent,) = inputs
        return rounded(latent, latent.new_zeros(*latent.shape[:-1], 8))[0]

    def heads_of_rounded(q: Tensor, kv: Tensor, key: Tensor, turn: Tensor) -> tuple[Tensor, ...]:
        q, k, v = mla_heads(q, kv, key, turn)
        _, turned = rounded(key.new_zeros(*key.shape[:-1], rank), rotate(key, turn))
        k[..., -key.shape[-1] :] = turned.unsqueeze(2)
        return q, k, v

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "mla_heads", heads_of_rounded)
        projections = [block.self_attn.kv_b_proj for block in model.blocks]
        hooks = [each.register_forward_pre_hook(round_latent) for each in projections]
        logits = model(torch.tensor([tokens])).logits[0]
        for hook in hooks:
            hook.remove()
    return logits.log_softmax(-1)


WAYS = {
    "one after the other": {"max_running": 1, "prefix_cache": False},
    "together": {},
    "chunks": {"max_running": 3, "token_budget": 3 + PAGE},
    "drafts": {"drafts": 3, "prefix_cache": False},
    "all of it": {"max_running": 2, "drafts": 2, "token_budget": 6 + PAGE, "cache_tokens": 448},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_a_network_whose_latents_are_rounded_by_hand(
    config: ModelConfig, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they do not depend on pages found again, chunks, drafts or the batch."""
    model = Transformer.create(config, dtype=torch.float64).requires_grad_(False)
    engine = Engine(model, None, EngineConfig(fp8_cache=True, **WAYS[way]))
    requests = [Request(prompt, GREEDY) for prompt in prompts()]
    engine.complete(requests[:-3])
    engine.complete(requests[-3:])
    for request in requests:
        right = logprobs_by_hand(model, [*request.prompt, *request.tokens], monkeypatch)
        right = right[len(request.prompt) - 1 : -1]
        assert request.tokens == right.argmax(-1).tolist()
        own = torch.tensor([entry.logprob for entry in request.logprobs])
        torch.testing.assert_close(own, right.amax(-1).float(), rtol=0, atol=1e-4)
    assert (engine.stats.cached_prompt_tokens > 0) == engine.config.prefix_cache
    assert (engine.stats.accepted > 0) == (engine.config.drafts > 0)


def test_logprobs_are_close_to_those_of_a_plain_cache(config: ModelConfig) -> None:
    """E4M3 moves a number by at most 1/16, by 2.6 % on average (root mean square).

    A smooth network passes on what comes in, so its log-probabilities should move by no larger a
    part of their spread than 1/16. Experts are left out: a choice by a hair is not smooth.
    """
    smooth = {"first_k_dense_replace": config.num_hidden_layers, "initializer_range": 0.1}
    model = Transformer.create(config.model_copy(update=smooth)).requires_grad_(False)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(fp8: bool) -> Tensor:
        found = Engine(model, None, EngineConfig(fp8_cache=fp8)).generate(prompts(), params)
        scored = [entry for each in found for entry in (each.prompt_logprobs or [])]
        return torch.tensor([entry.logprob for entry in scored if entry is not None])

    plain, rounded = logprobs(False), logprobs(True)
    off = (rounded - plain).norm() / (plain - plain.mean()).norm()
    assert 0.001 < off < 1 / 16


def test_refreshed_weights_are_used_by_requests_under_way(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (Transformer.create(config, seed=s, dtype=torch.float64) for s in (0, 1))
    engine = Engine(model, None, EngineConfig(fp8_cache=True))
    request = Request(prompts()[4], GREEDY)
    engine.add(request)
    for _ in range(4):
        engine.step()
    engine.refresh(other.state_dict().items())
    begun = len(request.tokens)
    assert 0 < begun < NEW
    while engine.has_work:
        engine.step()
    right = logprobs_by_hand(other, [*request.prompt, *request.tokens], monkeypatch).argmax(-1)
    assert request.tokens[begun:] == right[len(request.prompt) + begun - 1 : -1].tolist()


def test_as_much_memory_holds_more_tokens() -> None:
    """1,152 bytes a token and layer of V3 become 656."""
    with torch.device("meta"):
        model = Transformer(ModelConfig()).to(torch.bfloat16)
    plain, fp8 = (pages_that_fit(model, EngineConfig(fp8_cache=fp8)) for fp8 in (False, True))
    assert fp8 / plain == pytest.approx(1152 / 656, rel=0.01)


def test_bad_settings_are_refused_in_one_line(config: ModelConfig) -> None:
    values: dict[str, object] = {}
    apply_override(values, "engine.fp8_cache=e5m2")
    with pytest.raises(UserError, match=r"^engine\.fp8_cache is 'e5m2'; must be a valid boolean$"):
        validated(ServeConfig, values)
    odd = Transformer.create(config.model_copy(update={"kv_lora_rank": 18}))
    with pytest.raises(UserError, match="multiple of 4, and this network's is 18: use fp8_cache"):
        Engine(odd, None, EngineConfig(fp8_cache=True))


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("rank", [16, 512])
def test_cuda_graphs_change_nothing(config: ModelConfig, rank: int, drafts: int) -> None:
    """Not a bit, where products do not depend on the rows that pad a graph."""
    even = {"hidden_size": 128, "q_lora_rank": 32, "kv_lora_rank": rank, "qk_nope_head_dim": 32}
    even |= {"qk_rope_head_dim": 64, "v_head_dim": 32, "intermediate_size": 256}
    even |= {"moe_intermediate_size": 128}
    model = Transformer.create(
        config.model_copy(update=even), device="cuda", dtype=torch.bfloat16
    ).requires_grad_(False)
    found = []
    for graphs in (False, True):
        settings = EngineConfig(
            fp8_cache=True, batch_invariant=True, cuda_graphs=graphs, drafts=drafts, max_running=5
        )
        completions = Engine(model, None, settings).generate(prompts(), GREEDY)
        found.append([(each.tokens, each.logprobs) for each in completions])
    assert found[0] == found[1]
