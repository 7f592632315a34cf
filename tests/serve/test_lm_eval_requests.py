"""What lm-evaluation-harness 0.4.13 sends and reads (``local-completions``), by the network itself.

The bodies are as it sent them, with this tokenizer's tokens; the columns are read as it reads them.
"""

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from serve.conftest import Running
from torch import Tensor

from whalefall.data.tokenizer import Tokenizer
from whalefall.model.transformer import Transformer

Score = tuple[float, bool]

PAIRS = [
    ("def f(x):\n    return", " x + 1\n"),
    ("def f(x):\n    return", " not x"),
    ("s = 'naïve — ", "漢字🙂'\n"),
    ("x", "="),
    ("for i in range(100):\n" * 12, "    print(i, x ** i)\n" * 9),
]


@pytest.fixture
def harness(live: Running) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client


@torch.no_grad()
def logits(network: Transformer, tokens: list[int]) -> Tensor:
    return network(torch.tensor([tokens])).logits[0].float()


def by_network(network: Transformer, context: list[int], continuation: list[int]) -> Score:
    """The continuation's log-probability, and whether each of its tokens is the likeliest."""
    rows = logits(network, context + continuation)[len(context) - 1 : -1].log_softmax(-1)
    tokens = torch.tensor(continuation)
    total = rows.gather(-1, tokens[:, None]).sum().item()
    return total, torch.equal(rows.argmax(-1), tokens)


def by_server(client: httpx.Client, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
    """Its ``_create_payload`` and ``parse_logprobs``: the last entry is the generated token's."""
    body = {
        "model": "tiny",
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    scores = []
    choices = sorted(posted(client, body)["choices"], key=lambda choice: choice["index"])
    for (context, _), choice in zip(pairs, choices, strict=True):
        own = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        is_greedy = all(one == max(best.values()) for one, best in zip(own, top, strict=True))
        scores.append((sum(own), is_greedy))
    return scores


def posted(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("batch", [1, 8])
def test_choices(
    harness: httpx.Client, network: Transformer, tokenizer: Tokenizer, batch: int
) -> None:
    """Prompts without a token that begins them, in batches of different lengths, and twice."""
    pairs = [(tokenizer.encode(before), tokenizer.encode(after)) for before, after in PAIRS]
    expected = [by_network(network, *pair) for pair in pairs]
    for _ in range(2):  # the second time, what was computed is in the cache
        batches = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
        scores = [score for some in batches for score in by_server(harness, some)]
        for (found, is_greedy), (total, was_greedy) in zip(scores, expected, strict=True):
            assert math.isclose(found, total, abs_tol=1e-3)
            assert is_greedy == was_greedy


def test_what_the_network_would_write_is_greedy(
    harness: httpx.Client, network: Transformer, tokenizer: Tokenizer
) -> None:
    context, continuation = tokenizer.encode("def f(x):"), list[int]()
    for _ in range(6):
        continuation.append(int(logits(network, context + continuation)[-1].argmax()))
    other = [*continuation[:-1], (continuation[-1] + 1) % network.config.vocab_size]
    scores = by_server(harness, [(context, continuation), (context, other)])
    assert [is_greedy for _, is_greedy in scores] == [True, False]


def test_a_document_in_windows(
    harness: httpx.Client, network: Transformer, tokenizer: Tokenizer
) -> None:
    """``loglikelihood_rolling``: the first window follows BOS, and each fills the context."""
    size = network.config.max_position_embeddings - 2  # its max_length, less two
    tokens = tokenizer.encode("def f(x):\n    return x + 1\n" * 50)
    last = len(tokens) - 2 * size
    windows = [
        ([tokenizer.bos_id], tokens[:size]),
        ([tokens[size - 1]], tokens[size : 2 * size]),
        (tokens[-size - 1 : -last], tokens[-last:]),
    ]
    for window in windows:
        [(found, _)] = by_server(harness, [window])
        assert math.isclose(found, by_network(network, *window)[0], rel_tol=1e-5, abs_tol=1e-3)


def test_generation(harness: httpx.Client, network: Transformer, tokenizer: Tokenizer) -> None:
    """``generate_until``; one request at a time adds the end token's spelling to ``stop``."""
    prompt = tokenizer.encode("def f(x):")
    tokens: list[int] = []
    while len(tokens) < 48 and tokens[-1:] != [tokenizer.eos_id]:
        tokens.append(int(logits(network, prompt + tokens)[-1].argmax()))
    stops = ["\nclass", "\ndef", tokenizer.decode([tokenizer.eos_id], specials=True)]
    body = {
        "prompt": [prompt],
        "model": "tiny",
        "max_tokens": 48,
        "temperature": 0.0,
        "stop": stops,
        "seed": 1234,
    }
    text = tokenizer.decode(tokens)
    for stop in stops:
        text = text.partition(stop)[0]
    assert posted(harness, body)["choices"][0]["text"] == text


def test_the_end_token_has_an_entry(
    harness: httpx.Client, network: Transformer, tokenizer: Tokenizer
) -> None:
    """Where the network would end: else the last entry were the continuation's own."""
    words = torch.arange(64)
    pairs = torch.cartesian_prod(words, words)
    with torch.no_grad():
        ends = network(pairs).logits[:, -1].argmax(-1) == tokenizer.eos_id
    assert ends.any()
    for first, second in pairs[ends].tolist()[:4]:
        [(found, is_greedy)] = by_server(harness, [([first], [second])])
        total, was_greedy = by_network(network, [first], [second])
        assert math.isclose(found, total, abs_tol=1e-3)
        assert is_greedy == was_greedy
