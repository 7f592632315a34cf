"""Generation with the latent cache: prefill each prompt, then decode all of them together.

``decode`` is the one loop; completions, streams and tests are made of what it yields.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from whalefall.data.fim import fim_prompt
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.sampling import SamplingParams, sample, uniform
from whalefall.engine.text import StreamedText
from whalefall.errors import UserError
from whalefall.model.cache import LatentCache
from whalefall.model.transformer import Transformer

FinishReason = Literal["stop", "length"]


class Completion(NamedTuple):
    text: str
    tokens: list[int]
    """Everything sampled but the end token: with a stop string, also the tokens that spell it."""
    finish_reason: FinishReason
    """``stop`` at the end token or a stop string, ``length`` at ``max_tokens``."""


@dataclass(eq=False)
class Request:
    """A prompt being continued. It is finished once it has a ``finish_reason``; anyone may set it.

    Raises UserError where the prompt is empty.
    """

    prompt: Sequence[int]
    params: SamplingParams
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the completion and are not part of it."""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a prompt without tokens cannot be continued")
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def longest(self) -> int:
        """Tokens it may come to hold, the prompt's included."""
        return len(self.prompt) + self.params.max_tokens

    def accept(self, token: int) -> None:
        if token in self.end_tokens:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.params.max_tokens:
            self.finish_reason = "length"


@torch.inference_mode()
def decode(model: Transformer, requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Continue the requests together; after each step, yield those that took part in it.

    Requests that have finished leave the batch, and cost nothing from then on.
    """
    if not requests:
        return
    running, device = list(requests), model.lm_head.weight.device
    cache = LatentCache(
        model.config,
        batch=len(running),
        capacity=max(request.longest for request in running),
        device=device,
        dtype=model.lm_head.weight.dtype,
    )
    hidden = prefill(model, running, cache)
    while True:
        uniforms = [uniform(r.seed, len(r.prompt) + len(r.tokens)) for r in running]
        tokens = sample(model.head(hidden), [r.params for r in running], uniforms)
        for request, token in zip(running, tokens.tolist(), strict=True):
            request.accept(token)
        yield running
        rows = [row for row, request in enumerate(running) if request.finish_reason is None]
        if not rows:
            return
        if len(rows) < len(running):
            running, tokens = [running[row] for row in rows], tokens[rows]
            cache.keep(rows)
        hidden = model.decode(tokens.unsqueeze(1), cache)[:, -1]


def prefill(model: Transformer, requests: Sequence[Request], cache: LatentCache) -> Tensor:
    """Fill each request's row of the cache; the prompts' last representations [batch, hidden]."""
    last = []
    for row, request in enumerate(requests):
        prompt = torch.tensor([request.prompt], device=cache.latents.device)
        last.append(model.decode(prompt, cache.row(row))[:, -1])
        cache.lengths[row] = len(request.prompt)
    return torch.cat(last)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | str,
    params: SamplingParams,
    *,
    suffixes: Sequence[str | None] | None = None,
) -> list[Completion]:
    """Continue every prompt; with ``suffixes``, write what belongs between a prompt and its suffix.

    Raises:
        UserError: a prompt and ``max_tokens`` exceed the context, or there are not as many suffixes
            as prompts, or the tokenizer has no fill-in-the-middle tokens.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    suffixes = [None] * len(prompts) if suffixes is None else suffixes
    if len(suffixes) != len(prompts):
        raise UserError(f"{len(prompts)} prompts come with {len(suffixes)} suffixes")
    requests = [
        make_request(model, tokenizer, prompt, params, suffix)
        for prompt, suffix in zip(prompts, suffixes, strict=True)
    ]
    texts = dict.fromkeys(requests, "")
    for request, piece in _pieces(model, tokenizer, requests):
        texts[request] += piece
    return [
        Completion(text, request.tokens, cast(FinishReason, request.finish_reason))
        for request, text in texts.items()
    ]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    *,
    suffix: str | None = None,
) -> Iterator[str]:
    """The text of ``generate`` as it comes: whole characters, never a part of a stop string.

    Raises:
        UserError: as ``generate`` does, before anything is generated.
    """
    request = make_request(model, tokenizer, prompt, params, suffix)
    return (piece for _, piece in _pieces(model, tokenizer, [request]) if piece)


def make_request(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    suffix: str | None = None,
) -> Request:
    """Tokens of a prompt as the model saw documents begin. Raises UserError beyond the context.

    Nothing is shortened silently, neither the prompt nor ``max_tokens``.
    """
    if suffix is None:
        tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    else:
        tokens = fim_prompt(tokenizer, prompt, suffix)
    request = Request(tokens, params, frozenset([tokenizer.eos_id]))
    context = model.config.max_position_embeddings
    if request.longest > context:
        raise UserError(
            f"the prompt has {len(tokens)} tokens and max_tokens is {params.max_tokens}; together "
            f"they exceed the context of {context} tokens (max_position_embeddings)"
        )
    return request


def _pieces(
    model: Transformer, tokenizer: Tokenizer, requests: Sequence[Request]
) -> Iterator[tuple[Request, str]]:
    """Text of the requests as it becomes certain; a stop string ends its request."""
    texts = {request: StreamedText(tokenizer, request.params.stop) for request in requests}
    for step in decode(model, requests):
        for request in step:
            text = texts[request]
            piece = text.read(request.tokens, ended=request.finish_reason is not None)
            if text.stopped:
                request.finish_reason = "stop"
            yield request, piece
