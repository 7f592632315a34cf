"""Completions of texts and tokens, with ``echo``, ``logprobs`` and ``suffix``."""

from collections.abc import Sequence

from whalefall.data.fim import prompt_tokens
from whalefall.engine.request import Delta, TokenLogprobs
from whalefall.serve.constraints import text_grammar
from whalefall.serve.errors import ApiError
from whalefall.serve.job import Job
from whalefall.serve.logprobs import TextOffsets
from whalefall.serve.protocol import CompletionBody
from whalefall.serve.responses import Completion, TextChoice, TextLogprobs
from whalefall.serve.service import Service

_DEFAULT_MAX_TOKENS = 16


def count(body: CompletionBody) -> int:
    """Completions that ``body`` asks for."""
    is_many = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    return (len(body.prompt) if is_many else 1) * (body.n or 1)


class CompletionJob(Job):
    """Raises ApiError or UserError, when made, for what cannot be done."""

    def __init__(self, service: Service, body: CompletionBody, salt: str) -> None:
        super().__init__(service, body, salt, "cmpl")
        _check(body)
        model = service.model
        params = self.params(
            body,
            grammar=text_grammar(body),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        # The engine generates one token at least: with max_tokens 0 it is not shown.
        self._is_silent = body.max_tokens == 0
        self._choices: list[_Choice] = []
        for prompt in _prompts(body):
            tokens = self._tokens(prompt, body.suffix)
            self.add_requests(tokens, params, body.max_tokens, _DEFAULT_MAX_TOKENS)
            text = prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
            for _ in range(self.n):
                offsets = None if body.logprobs is None else TextOffsets(model.tokenizer)
                index = len(self._choices)
                self._choices.append(_Choice(index, text if body.echo else None, offsets))

    def read(self, index: int, delta: Delta) -> Completion | None:
        piece = self._choices[index].read(delta, silent=self._is_silent)
        if not (piece.text or piece.finish_reason or (piece.logprobs and piece.logprobs.tokens)):
            return None
        return Completion(**self.head, choices=[piece])

    def is_over(self, index: int) -> bool:
        return self._choices[index].whole.finish_reason is not None

    def usage_chunk(self) -> Completion:
        hidden = sum(len(r.tokens) for r in self.requests) if self._is_silent else 0
        return Completion(**self.head, choices=[], usage=self.usage(hidden_tokens=hidden))

    def response(self) -> Completion:
        chunk = self.usage_chunk()
        return chunk.model_copy(update={"choices": [choice.whole for choice in self._choices]})

    def _tokens(self, prompt: str | list[int], suffix: str | None) -> list[int]:
        model = self.service.model
        if isinstance(prompt, str):
            return prompt_tokens(model.tokenizer, prompt, suffix)
        if (largest := max(prompt)) >= model.vocab_size:
            raise ApiError(
                400,
                f"the prompt holds token {largest}; the vocabulary has {model.vocab_size}",
                param="prompt",
            )
        return prompt


class _Choice:
    """One completion: ``whole`` is all of it so far."""

    def __init__(self, index: int, echo: str | None, offsets: TextOffsets | None) -> None:
        logprobs = None if offsets is None else TextLogprobs()
        self.whole = TextChoice(index=index, text="", logprobs=logprobs)
        self._echo = echo
        self._offsets = offsets

    def read(self, delta: Delta, *, silent: bool) -> TextChoice:
        """What ``delta`` adds; ``silent`` leaves its text out, and ends after the first token."""
        tokens: list[int] = [] if silent else delta.tokens
        entries: Sequence[TokenLogprobs | None] = [] if silent else delta.logprobs
        text = "" if silent else delta.text
        if delta.end is not None and not silent:
            # Each chosen token has an entry; lm-evaluation-harness reads the last one as its own.
            tokens, entries = [*tokens, delta.end.token], [*entries, delta.end]
        if self._echo is not None:
            request = delta.request
            tokens = [*request.prompt, *tokens]
            entries = [*(request.prompt_logprobs or ()), *entries]
            text, self._echo = self._echo + text, None
        finish = delta.finish_reason
        assert finish != "abort"  # such a delta is an error, and not read
        whole = self.whole
        piece = TextChoice(
            index=whole.index, text=text, finish_reason="length" if silent else finish
        )
        whole.text += text
        whole.finish_reason = piece.finish_reason
        if self._offsets is not None and whole.logprobs is not None:
            piece.logprobs = self._offsets.lay_out(tokens, entries)
            for column in TextLogprobs.model_fields:
                getattr(whole.logprobs, column).extend(getattr(piece.logprobs, column))
        return piece


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    match body.prompt:
        case str() as text:
            return [text]
        case [int(), *_] as tokens:
            return [[token for token in tokens if isinstance(token, int)]]
        case many:
            return [prompt for prompt in many if not isinstance(prompt, int)]


def _check(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(
            400, "best_of is not supported: ask for n completions and choose", param="best_of"
        )
    if body.suffix is None:
        return
    if body.echo:
        raise ApiError(400, "echo and suffix exclude each other", param="echo")
    if not all(isinstance(prompt, str) for prompt in _prompts(body)):
        raise ApiError(400, "a suffix needs a prompt that is text, not tokens", param="suffix")
