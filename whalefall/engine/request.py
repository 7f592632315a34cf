"""What is asked of the engine, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from uuid import uuid4

from whalefall.engine.sampling import SamplingParams
from whalefall.errors import UserError

FinishReason = Literal["stop", "length", "abort"]
"""``stop`` at an end token or a stop string, ``length`` at ``max_tokens``."""


class TokenLogprobs(NamedTuple):
    """Of one token: log-softmax of the logits as they come, before any sampling rule."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens of the position, best first."""


@dataclass(eq=False)
class Request:
    """A prompt to continue. Raises UserError where it is empty."""

    prompt: Sequence[int]
    params: SamplingParams
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the completion and are not part of it."""
    salt: str = ""
    """Cached prompts are shared between requests of the same salt only."""
    id: str = field(default_factory=lambda: uuid4().hex)

    tokens: list[int] = field(default_factory=list)
    """Generated so far, without an end token; with a stop string, also those that spell it."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One a generated token, where ``params.logprobs`` asks for them."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One a prompt token (None for the first), where ``params.prompt_logprobs`` asks for them."""
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    """Tokens of the prompt whose latents were in the cache already."""
    drafted: int = 0
    """Tokens that MTP proposed."""
    accepted: int = 0
    """Those of them that the network would have chosen itself."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a prompt without tokens cannot be continued")

    @property
    def longest(self) -> int:
        """Tokens it may come to hold, the prompt's included."""
        return len(self.prompt) + self.params.max_tokens


class Delta(NamedTuple):
    """What one step added to a request."""

    request: Request
    text: str
    """Text that became certain: whole characters, nothing that may turn out a stop string."""
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None
    end: TokenLogprobs | None = None
    """Of the end token, which is not among ``tokens``, where log-probabilities are wanted."""


class Completion(NamedTuple):
    text: str
    tokens: list[int]
    """Everything sampled but the end token: with a stop string, also the tokens that spell it."""
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs | None] | None
    cached_tokens: int
    drafted: int
    accepted: int
