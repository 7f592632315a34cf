"""Texts in, texts out: an engine made for a few prompts, and gone with them."""

from collections.abc import Iterator, Sequence

from whalefall.config.engine import EngineConfig
from whalefall.data.fim import prompt_tokens
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.engine import Engine
from whalefall.engine.request import Completion, Request
from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | str,
    params: SamplingParams,
    *,
    suffixes: Sequence[str | None] | None = None,
    drafts: int = 0,
) -> list[Completion]:
    """Continue every prompt; with ``suffixes``, write what belongs between a prompt and its suffix.

    MTP proposes ``drafts`` tokens a step: they change how fast the texts come, not the texts.

    Raises:
        UserError: a prompt and ``max_tokens`` exceed the context, or there are not as many suffixes
            as prompts, or the tokenizer has no fill-in-the-middle tokens.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    suffixes = [None] * len(prompts) if suffixes is None else suffixes
    if len(suffixes) != len(prompts):
        raise UserError(f"{len(prompts)} prompts come with {len(suffixes)} suffixes")
    requests = [
        make_request(tokenizer, prompt, params, suffix)
        for prompt, suffix in zip(prompts, suffixes, strict=True)
    ]
    return engine_for(model, tokenizer, requests, drafts=drafts).complete(requests)


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    *,
    suffix: str | None = None,
    drafts: int = 0,
) -> Iterator[str]:
    """The text of ``generate`` as it comes: whole characters, never a part of a stop string.

    Raises:
        UserError: as ``generate`` does, before anything is generated.
    """
    request = make_request(tokenizer, prompt, params, suffix)
    engine = engine_for(model, tokenizer, [request], drafts=drafts)
    engine.add(request)

    def pieces() -> Iterator[str]:
        while engine.has_work:
            yield from (delta.text for delta in engine.step() if delta.text)

    return pieces()


def make_request(
    tokenizer: Tokenizer, prompt: str, params: SamplingParams, suffix: str | None = None
) -> Request:
    """Tokens of a prompt as the model saw documents begin. Nothing is shortened."""
    tokens = prompt_tokens(tokenizer, prompt, suffix)
    return Request(tokens, params, frozenset([tokenizer.eos_id]))


def engine_for(
    model: Transformer,
    tokenizer: Tokenizer | None,
    requests: Sequence[Request],
    *,
    drafts: int = 0,
) -> Engine:
    """An engine with room for these requests at once, and no more."""
    rows = max(1, len(requests))
    # One more each: a request enters where all that run could still grow.
    pages = sum(-(-request.longest // PAGE) + 1 for request in requests)
    prompts = sum(-(-len(request.prompt) // PAGE) for request in requests)
    config = EngineConfig(
        max_running=rows,
        token_budget=rows * (1 + drafts) + max(1, min(prompts, 128)) * PAGE,
        cache_tokens=max(1, pages) * PAGE,
        drafts=drafts,
        prefix_cache=False,
        cuda_graphs=False,
    )
    return Engine(model, tokenizer, config)
