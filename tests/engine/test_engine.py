"""The engine: the tokens of ``transformers``, however requests come, wait, share and speculate."""

import random
from collections.abc import Iterator
from functools import cache

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from whalefall.config.engine import EngineConfig
from whalefall.config.model import ModelConfig
from whalefall.engine.engine import Engine
from whalefall.engine.request import Request
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.model.inference import hold_fp8
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE

NEW = 8
CONTEXT = 512
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_nextn_predict_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": CONTEXT,
}


def prompts() -> list[list[int]]:
    """Lengths on both sides of pages; some begin as others do."""
    draw = random.Random(0)
    shared = [draw.randrange(64) for _ in range(2 * PAGE + 7)]
    fresh = [[draw.randrange(64) for _ in range(n)] for n in (1, 5, 63, 64, 65, 150)]
    continued = [shared[:n] + [draw.randrange(64) for _ in range(9)] for n in (64, 70, 128, 135)]
    return [*fresh, shared, shared[:PAGE], *continued]


@cache
def network(mtp: int = 1) -> Transformer:
    """Its drafts are right now and then: MTP's layer is nearly nothing, and words repeat."""
    base = {"first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16}
    heads = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12}
    experts = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    config = ModelConfig(**{**base, **heads, **experts, **SHAPE, "moe_intermediate_size": 20})
    config = config.model_copy(update={"num_nextn_predict_layers": mtp})
    return Transformer.create(config).requires_grad_(False)


@cache
def expected() -> list[list[int]]:
    """What ``transformers`` continues each prompt with, greedily."""
    model = network()
    peer = DeepseekV3ForCausalLM(DeepseekV3Config(**model.config.to_hf())).eval()
    peer.load_state_dict({name: model.state_dict()[name] for name in peer.state_dict()})
    peer.generation_config.eos_token_id = None
    tokens = []
    for prompt in prompts():
        inputs = torch.tensor([prompt])
        mask = torch.ones_like(inputs)
        out = peer.generate(inputs, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


@st.composite
def loads(draw: st.DrawFn) -> tuple[EngineConfig, bool, list[tuple[int, int, int, int | None]]]:
    """A configuration, whether the host is ahead, and requests: prompt, length, arrival, abort."""
    drafts, running = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    config = EngineConfig(
        max_running=running,
        drafts=drafts,
        token_budget=running * (1 + drafts) + draw(st.sampled_from([PAGE, 2 * PAGE, 1000])),
        cache_tokens=PAGE * draw(st.integers(3, 12)),
        prefix_cache=draw(st.booleans()),
    )
    request = st.tuples(
        st.integers(0, len(prompts()) - 1),
        st.integers(1, NEW),
        st.integers(0, 9),
        st.none() | st.none() | st.integers(0, 20),
    )
    return config, draw(st.booleans()), draw(st.lists(request, min_size=1, max_size=7))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without checks of shapes, which take most of the time of so small a network."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=130, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_greedy_tokens_are_those_of_transformers(part: int, data: st.DataObject) -> None:
    """Continuous batching, chunked prompts, shared pages, preemption, aborts and speculation."""
    load = data.draw(loads())
    config, is_ahead, asked = load
    engine = Engine(network(), None, config)
    engine._is_ahead = is_ahead  # as on a GPU
    requests = []
    for prompt, length, _, _ in asked:
        params = SamplingParams(max_tokens=length, temperature=0.0)
        requests.append(Request(prompts()[prompt], params))
    streamed: dict[Request, list[int]] = {request: [] for request in requests}
    for step in range(10_000):
        for request, (_, _, arrival, abort) in zip(requests, asked, strict=True):
            if arrival == step:
                engine.add(request)
            if abort is not None and abort == step - arrival:
                engine.abort(request)
        for delta in engine.step():
            streamed[delta.request] += delta.tokens
        if step > 9 and not engine.has_work:
            break
    for request, (prompt, length, _, abort) in zip(requests, asked, strict=True):
        assert request.tokens == streamed[request]
        if request.finish_reason == "abort":
            assert abort is not None
            assert request.tokens == expected()[prompt][: len(request.tokens)]
        else:
            assert request.finish_reason == "length"
            assert request.tokens == expected()[prompt][:length]
    for _ in range(2):  # a step may still be under way
        engine.step()
    assert engine.pool.available == engine.pool.pages


@pytest.mark.parametrize("mtp", [1, 2])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_sampled_tokens_do_not_depend_on_drafts(mtp: int, drafts: int) -> None:
    """So speculation is exact: the same seed writes the same text."""
    params = SamplingParams(
        max_tokens=60, temperature=0.7, top_p=0.9, seed=5, frequency_penalty=0.3, min_p=0.01
    )
    plain = Engine(network(mtp)).generate(prompts(), params)
    config = EngineConfig(drafts=drafts)
    speculated = Engine(network(mtp), None, config).generate(prompts(), params)
    assert [c.tokens for c in speculated] == [c.tokens for c in plain]
    assert sum(c.accepted for c in speculated) > 0
    assert all(c.drafted == 0 for c in plain)


def test_a_network_that_guesses_itself_needs_fewer_steps() -> None:
    """With a head that says the same word everywhere, every draft is right."""
    model = Transformer.create(network().config)
    torch.nn.init.zeros_(model.lm_head.weight)
    engine = Engine(model, None, EngineConfig(drafts=3))
    [completion] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=21, temperature=0.0))
    assert completion.tokens == [0] * 21
    assert completion.accepted == completion.drafted == 15
    assert engine.stats.steps == 1 + 5


def test_logprobs_are_those_of_the_whole_network() -> None:
    model, texts = network(), prompts()[4:7]
    params = SamplingParams(max_tokens=9, temperature=0.0, logprobs=3, prompt_logprobs=2)
    for drafts in (0, 2):
        config = EngineConfig(drafts=drafts, token_budget=1024, max_running=4)
        for prompt, found in zip(
            texts, Engine(model, None, config).generate(texts, params), strict=True
        ):
            tokens = torch.tensor([prompt + found.tokens])
            whole = model(tokens).logits[0].log_softmax(-1)
            assert found.prompt_logprobs is not None
            first, *rest = found.prompt_logprobs
            scored = [*rest, *found.logprobs]
            assert first is None and len(scored) == len(prompt) + 9 - 1
            for position, entry in enumerate(scored):
                assert entry.token == tokens[0, position + 1]
                assert entry.logprob == pytest.approx(whole[position, entry.token].item(), abs=1e-4)
                best = whole[position].topk(len(entry.top))
                assert len(entry.top) == (2 if position < len(prompt) - 1 else 3)
                values = [value for _, value in entry.top]
                torch.testing.assert_close(torch.tensor(values), best.values, atol=1e-4, rtol=0)


def test_prompts_are_found_again_but_not_across_salts() -> None:
    engine = Engine(network())
    params = SamplingParams(max_tokens=3, temperature=0.0)
    shared = prompts()[6]
    for salt, cached in (("a", 0), ("a", 2 * PAGE), ("b", 0), ("b", 2 * PAGE)):
        request = Request(shared, params, salt=salt)
        engine.complete([request])
        assert request.cached_tokens == cached
    assert engine.stats.cached_prompt_tokens == 4 * PAGE


@pytest.mark.parametrize("is_ahead", [False, True])
def test_refreshed_weights_are_used_from_the_next_step(is_ahead: bool) -> None:
    """Also by requests under way, and by none of what the old ones left in the cache."""
    engine, other = Engine(Transformer.create(network().config)), network()
    engine._is_ahead = is_ahead
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    running = Request(prompts()[9], params)
    engine.add(running)
    for _ in range(4):
        engine.step()
    assert 0 < len(running.tokens) < NEW
    engine.refresh(other.state_dict().items())
    begun = len(running.tokens)
    again = Request(prompts()[9], params)
    engine.complete([again])
    assert again.tokens == expected()[9]
    while engine.has_work:
        engine.step()
    whole = torch.tensor([[*running.prompt, *running.tokens]])
    argmax = other(whole).logits[0].argmax(-1)
    assert running.tokens[begun:] == argmax[len(running.prompt) + begun - 1 : -1].tolist()
    with pytest.raises(UserError, match="no parameter"):
        engine.refresh([("nothing", torch.zeros(1))])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: Request([1] * 500, SamplingParams(max_tokens=13)), "exceed the context of 512"),
        (lambda: Request([64], SamplingParams()), "none of the vocabulary's 64"),
        (lambda: Request([-1], SamplingParams()), "none of the vocabulary's 64"),
        (lambda: Request([], SamplingParams()), "without tokens"),
        (lambda: Request([1], SamplingParams(logit_bias={64: 1.0})), "logit_bias names token 64"),
        (lambda: Request([1], SamplingParams(stop="x")), "need a tokenizer"),
        (lambda: Request([1] * 150, SamplingParams(max_tokens=100)), "the cache has 2"),
    ],
)
def test_what_cannot_run_is_refused(request_, message: str) -> None:
    engine = Engine(network(), None, EngineConfig(cache_tokens=2 * PAGE))
    with pytest.raises(UserError, match=message):
        engine.add(request_())
    assert not engine.has_work


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(UserError, match="MTP module"):
        Engine(network(0), None, EngineConfig(drafts=1))
    with pytest.raises(UserError, match="token_budget is 100"):
        Engine(network(), None, EngineConfig(token_budget=100))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", ["", "weights", "cache"], ids=["bf16", "fp8", "fp8-cache"])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_on_a_gpu_every_token_is_what_the_whole_network_finds_likely(drafts: int, fp8: str) -> None:
    """CUDA graphs, chunks, shared pages and speculation, a step ahead of the host, in BF16."""
    wide = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "q_lora_rank": 256,
        "initializer_range": 0.05,
    }
    config = network().config.model_copy(update=wide)
    model = Transformer.create(config, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    right = Transformer.create(config, device="cuda", dtype=torch.float64)
    right.load_state_dict(model.state_dict())
    if fp8 == "weights":
        hold_fp8(model)
    settings_ = EngineConfig(
        max_running=6,
        token_budget=128,
        drafts=drafts,
        cache_tokens=40 * PAGE,
        fp8_cache=fp8 == "cache",
    )
    engine = Engine(model, None, settings_)
    params = SamplingParams(max_tokens=40, temperature=0.0, logprobs=0, prompt_logprobs=0)
    off: list[Tensor] = []
    short: list[Tensor] = []
    for found, prompt in zip(engine.generate(prompts(), params), prompts(), strict=True):
        whole = torch.tensor([[*prompt, *found.tokens]], device="cuda")
        expected = right(whole).logits[0].log_softmax(-1)
        assert found.prompt_logprobs is not None
        entries = [*found.prompt_logprobs[1:], *found.logprobs]
        own = torch.tensor([entry.logprob for entry in entries], device="cuda").double()
        tokens = torch.tensor([entry.token for entry in entries], device="cuda")
        exact = expected[:-1].gather(1, tokens.unsqueeze(1)).squeeze(1)
        # Where an expert is chosen by a hair, rounding chooses another: few tokens are far off.
        off.append((own - exact).abs())
        best = expected[len(prompt) - 1 : -1].amax(-1)
        short.append(best - exact[len(prompt) - 1 :])
    assert torch.cat(off).median() < (0.1 if fp8 else 0.05)
    assert torch.cat(short).median() < 0.01 and torch.cat(short).mean() < (0.2 if fp8 else 0.1)
