"""The engine: requests in, tokens out, one step at a time.

On a GPU the host is a step ahead: it plans and launches a step before it reads what the one before
gave. What it learns late (an end token, a stop string) costs a row of one step and changes no
output. Where grammars run it is not ahead, because their masks depend on the tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from whalefall.config.engine import EngineConfig
from whalefall.data.fim import prompt_tokens
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.flight import Flight, Result
from whalefall.engine.grammar import Grammars, Matcher
from whalefall.engine.memory import pages_that_fit
from whalefall.engine.pages import PagePool
from whalefall.engine.request import Completion, Delta, FinishReason, Request, TokenLogprobs
from whalefall.engine.runner import Runner
from whalefall.engine.sampling import SamplingParams
from whalefall.engine.scheduler import Scheduler
from whalefall.engine.text import StreamedText
from whalefall.errors import UserError
from whalefall.model.inference import join_weights
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE


@dataclass
class EngineStats:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Continues any number of requests together.

    Without a tokenizer it knows no texts: no stop strings, no grammars, only tokens.

    Raises UserError where the configuration asks for what the network or the memory cannot give.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
    ):
        config = config or EngineConfig()
        join_weights(model)
        if config.drafts and not model.mtp_modules:
            raise UserError("drafts need an MTP module, and this network has none: use drafts=0")
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.context = model.config.max_position_embeddings
        self.stats = EngineStats()
        self.pool = PagePool(pages_that_fit(model, config), PAGE, prefix_cache=config.prefix_cache)
        self.scheduler = Scheduler(
            self.pool, slots=config.max_running, budget=config.token_budget, drafts=config.drafts
        )
        self._runner = Runner(model, config, self.pool.pages)
        self.grammars = Grammars(tokenizer, model.config.vocab_size) if tokenizer else None
        self._matchers: dict[Request, Matcher] = {}
        self._texts: dict[Request, StreamedText] = {}
        self._is_ahead = model.lm_head.weight.is_cuda
        self._flight: Flight | None = None
        self._landed: list[Delta] = []

    @property
    def has_work(self) -> bool:
        """There are requests that have not finished."""
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises UserError where it exceeds context or cache, or holds what cannot be had.
        """
        self._check(request)
        params = request.params
        if params.grammar is not None and self.grammars is not None:
            self._matchers[request] = self.grammars.matcher(params.grammar, request.end_tokens)
        self.scheduler.add(request)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        if self.tokenizer is not None:
            self._texts[request] = StreamedText(self.tokenizer, params.stop)

    def abort(self, request: Request) -> None:
        """Stop working on a request. One that has finished stays as it is."""
        self.scheduler.abort(request)
        self._forget(request)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Launch a step, and say what one added to requests: the same, or the one before it."""
        if self._matchers:
            self._land()
        landed, self._landed = self._landed, []
        plan = self.scheduler.schedule()
        launched = self._runner.launch(plan, self._matchers) if plan else None
        if self._is_ahead:
            self._flight, launched = launched, self._flight
        return landed + (self._settle(launched) if launched else [])

    def generate(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams
    ) -> list[Completion]:
        """Continue prompts, given as texts or as tokens, together with whatever else runs.

        Raises UserError where one does not fit, before anything is generated.
        """
        end = frozenset([self.tokenizer.eos_id]) if self.tokenizer else frozenset[int]()
        return self.complete([Request(self._tokens(prompt), params, end) for prompt in prompts])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their ends. Raises UserError where one does not fit, and adds none."""
        for request in requests:
            self._check(request)
        for request in requests:
            self.add(request)
        texts = dict.fromkeys(requests, "")
        while any(request.finish_reason is None for request in requests):
            for delta in self.step():
                if delta.request in texts:
                    texts[delta.request] += delta.text
        return [
            Completion(
                text,
                request.tokens,
                cast(FinishReason, request.finish_reason),
                request.logprobs,
                request.prompt_logprobs,
                request.cached_tokens,
                request.drafted,
                request.accepted,
            )
            for request, text in texts.items()
        ]

    @torch.no_grad()
    def refresh(self, weights: Iterable[tuple[str, Tensor]] = ()) -> None:
        """Go on with other weights: those given by name, or what the network itself now holds.

        Nothing that the old ones computed is used again: what runs keeps its tokens and is cached
        anew. Raises UserError where a name or shape is not the network's.
        """
        self._land()
        own = self.model.state_dict()
        for name, tensor in weights:
            if name not in own or own[name].shape != tensor.shape:
                raise UserError(f"the network has no parameter {name} of shape {tensor.shape}")
            own[name].copy_(tensor)
        self.scheduler.restart()

    def _tokens(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise UserError("a text needs a tokenizer, and this engine has none: give tokens")
        return prompt_tokens(self.tokenizer, prompt)

    def _check(self, request: Request) -> None:
        if request.longest > self.context:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and max_tokens is "
                f"{request.params.max_tokens}; together they exceed the context of {self.context} "
                "tokens (max_position_embeddings)"
            )
        vocab = self.model.config.vocab_size
        if min(request.prompt) < 0 or max(request.prompt) >= vocab:
            raise UserError(f"the prompt holds a token that is none of the vocabulary's {vocab}")
        request.params.check_vocabulary(vocab)
        if self.tokenizer is None and (request.params.stop or request.params.grammar):
            raise UserError("stop strings and grammars need a tokenizer; this engine has none")
        self.scheduler.check(request)

    def _land(self) -> None:
        """Wait for the step in flight; what it added is told with the next step."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._landed += self._settle(flight)

    def _settle(self, flight: Flight) -> list[Delta]:
        """Read a step, end what ends with it, and let the scheduler know."""
        results = flight.read()
        deltas = []
        self.stats.steps += 1
        for sequence, result in zip(flight.plan.rows, results, strict=True):
            request = sequence.request
            if request.finish_reason is None:
                deltas.append(self._take(request, result))
        self.scheduler.settle(flight.plan, [result.tokens for result in results])
        return deltas

    def _take(self, request: Request, result: Result) -> Delta:
        """What a request gains, up to where it ends."""
        before, finish = len(request.tokens), cast(FinishReason | None, None)
        end: TokenLogprobs | None = None
        request.drafted += result.drafted
        self.stats.drafted += result.drafted
        if before == 0:
            self.stats.prompt_tokens += len(request.prompt)
            self.stats.cached_prompt_tokens += request.cached_tokens
        text = ""
        streamed, matcher = self._texts.get(request), self._matchers.get(request)
        for number, token in enumerate(result.tokens):
            if number:
                request.accepted += 1
                self.stats.accepted += 1
            if matcher is not None:
                matcher.accept([token])
            if token in request.end_tokens and not request.params.ignore_eos:
                finish = "stop"
                end = result.logprobs[number] if result.logprobs else None
            else:
                request.tokens.append(token)
                if len(request.tokens) == request.params.max_tokens:
                    finish = "length"
            if streamed is not None:
                text += streamed.read(request.tokens, ended=finish is not None)
                if streamed.stopped:
                    finish = "stop"
            if finish is not None:
                break
        gained = request.tokens[before:]
        scored = result.logprobs[: len(gained)]
        request.logprobs += scored
        self.stats.generated_tokens += len(gained)
        request.finish_reason = finish
        if finish is not None:
            self._forget(request)
        return Delta(request, text, gained, scored, finish, end)

    def _forget(self, request: Request) -> None:
        self._texts.pop(request, None)
        self._matchers.pop(request, None)
