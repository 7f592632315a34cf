"""Batch-invariant mode: a request gets the same bits in any company, however it is worked on."""

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import jaxtyping
import pytest
import torch

from whalefall.config.engine import EngineConfig
from whalefall.config.model import ModelConfig
from whalefall.engine.engine import Engine
from whalefall.engine.request import Request
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.model.inference import hold_fp8, make_invariant
from whalefall.model.invariance import Invariance
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE

ODD: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 44,
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 320,
}
"""Sizes that fill no vector of a CPU."""
EVEN = ODD | {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 2048,
}
"""Rows of whole 16 bytes, as our products on CUDA take them."""
WIDE = EVEN | {
    "vocab_size": 16384,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
"""V3's latents, which have a kernel of their own on Hopper; many words, which ``topk`` cuts."""


class Kind(NamedTuple):
    """A network, and where it runs."""

    sizes: Literal["ODD", "EVEN", "WIDE"] = "ODD"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    fp8_cache: bool = False


@cache
def network(kind: Kind, invariant: bool = True) -> Transformer:
    config = ModelConfig(**{"ODD": ODD, "EVEN": EVEN, "WIDE": WIDE}[kind.sizes])
    model = Transformer.create(config, device=kind.device, dtype=kind.dtype)
    if kind.fp8:
        hold_fp8(model)
    if invariant:
        make_invariant(model)
    return model.requires_grad_(False)


@cache
def requests(longest: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts on both sides of pages, some beginning as others do; each in a way of its own."""
    draw = random.Random(0)
    shared = [draw.randrange(13) for _ in range(longest)]
    lengths = [5, *range(PAGE - 3, PAGE + 1), longest]
    prompts = [[draw.randrange(13) for _ in range(n)] for n in lengths]
    prompts += [shared[:n] + [draw.randrange(13)] * 3 for n in (PAGE, PAGE + 5, longest - 3)]
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.3, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.4, "min_p": 0.01},
        {"temperature": 0.0, "prompt_logprobs": 2, "presence_penalty": 0.5},
    ]
    return [
        (prompt, SamplingParams(max_tokens=6, logprobs=3, **ways[i % len(ways)]))
        for i, prompt in enumerate(prompts)
    ]


def bits(request: Request) -> tuple[Any, ...]:
    """All that must be equal, the numbers to the last bit."""
    assert request.finish_reason == "length"
    return request.tokens, request.logprobs, request.prompt_logprobs


@cache
def alone(kind: Kind, longest: int) -> list[tuple[Any, ...]]:
    """What each request gets from an engine of its own."""
    found = []
    for prompt, params in requests(longest):
        request = Request(prompt, params)
        config = EngineConfig(
            batch_invariant=True,
            cache_tokens=longest + PAGE,
            fp8_cache=kind.fp8_cache,
            cuda_graphs=kind.dtype == torch.bfloat16,
        )
        Engine(network(kind), None, config).complete([request])
        found.append(bits(request))
    return found


def crowd(kind: Kind, number: int, longest: int, most: int) -> Counter[str]:
    """Requests that come in any order to an engine of any size; what happened to them."""
    draw = random.Random(number)
    running, drafts = draw.randint(1, most), draw.randint(0, 3)
    config = EngineConfig(
        batch_invariant=True,
        max_running=running,
        drafts=drafts,
        token_budget=running * (1 + drafts) + draw.choice([PAGE, 2 * PAGE, 4000]),
        cache_tokens=(longest // PAGE + draw.choice([1, 2, 2, 6])) * PAGE,
        prefix_cache=draw.random() < 0.7,
        fp8_cache=kind.fp8_cache,
        cuda_graphs=kind.dtype == torch.bfloat16 and draw.random() < 0.8,
    )
    asked = draw.choices(range(len(requests(longest))), k=draw.randint(2, most))
    arrivals = [draw.randint(0, 2) for _ in asked]
    return check(kind, longest, config, asked, arrivals, is_ahead=draw.random() < 0.5)


def check(
    kind: Kind,
    longest: int,
    config: EngineConfig,
    asked: list[int],
    arrivals: list[int],
    *,
    is_ahead: bool = False,
) -> Counter[str]:
    """Run the requests of these numbers, each from its step on: their bits are as alone."""
    engine = Engine(network(kind), None, config)
    engine._is_ahead = is_ahead  # as on a GPU
    coming = [Request(*requests(longest)[number]) for number in asked]
    for step in range(10_000):
        for request, arrival in zip(coming, arrivals, strict=True):
            if arrival == step:
                engine.add(request)
        engine.step()
        if step >= max(arrivals) and not engine.has_work:
            break
    for request, number in zip(coming, asked, strict=True):
        assert bits(request) == alone(kind, longest)[number]
    return Counter(
        preempted=engine.scheduler.preemptions,
        cached=engine.stats.cached_prompt_tokens,
        accepted=engine.stats.accepted,
        rejected=engine.stats.drafted - engine.stats.accepted,
    )


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without checks of shapes, which take most of the time of so small a network."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("part", range(2))
def test_a_request_has_the_same_bits_in_any_crowd(part: int) -> None:
    """Beside others, in any order, in chunks, from the cache, preempted, and with any drafts."""
    happened: Counter[str] = Counter()
    for number in range(32 * part, 32 * part + 32):
        happened += crowd(Kind(), number, longest=72, most=3)
    assert happened.keys() >= {"cached", "accepted", "rejected"}


@pytest.mark.usefixtures("unchecked")
def test_so_it_has_where_the_cache_is_fp8() -> None:
    happened: Counter[str] = Counter()
    for number in range(64, 77):
        happened += crowd(Kind(fp8_cache=True), number, longest=72, most=3)
    assert happened.keys() >= {"preempted", "cached", "accepted", "rejected"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_preempted_request_has_the_same_bits(drafts: int) -> None:
    """Two prompts of almost a page grow beyond it at the same time, and there are three pages."""
    config = EngineConfig(batch_invariant=True, max_running=2, drafts=drafts, cache_tokens=3 * PAGE)
    assert check(Kind(), 72, config, [1, 2], [0, 0])["preempted"] > 0


def test_without_the_mode_bits_depend_on_the_crowd() -> None:
    """Where they did not, the mode would be of no use."""
    engine = Engine(network(Kind(), invariant=False))
    together, apart = ([Request(*asked) for asked in requests(72)] for _ in range(2))
    engine.complete(together)
    for request in apart:
        engine.complete([request])
    assert [bits(request) for request in together] != [bits(request) for request in apart]
    for request, other, right in zip(together, apart, alone(Kind(), 72), strict=True):
        first = request.logprobs[0].logprob
        assert first == pytest.approx(other.logprobs[0].logprob, abs=1e-4)
        assert first == pytest.approx(right[1][0].logprob, abs=1e-4)


CUDA = [
    Kind("EVEN", "cuda", torch.bfloat16),
    Kind("WIDE", "cuda", torch.bfloat16),
    Kind("WIDE", "cuda", torch.bfloat16, fp8=True),
    Kind("EVEN", "cuda", torch.bfloat16, fp8_cache=True),
    Kind("WIDE", "cuda", torch.bfloat16, fp8_cache=True),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kind", CUDA, ids=["plain", "wide", "fp8", "fp8-cache", "wide-fp8-cache"])
def test_cuda_request_has_the_same_bits_in_any_crowd(kind: Kind, number: int) -> None:
    """In few rows and many, in one piece of its keys and in two, as a graph and in mixed steps."""
    crowd(kind, number, longest=690, most=40)


@pytest.mark.gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("number", range(4))
def test_cuda_without_our_kernels_takes_one_token_after_the_other(number: int) -> None:
    kind = Kind("EVEN", "cuda")
    assert network(kind).invariance == Invariance(split_keys=512, block_rows=None)
    crowd(kind, number, longest=72, most=3)


@pytest.mark.gpu
def test_cuda_vocabularies_whose_rows_begin_anywhere_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4; this network's is 13"):
        network(Kind("ODD", "cuda"))
