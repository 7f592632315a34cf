"""Chooses tokens on the device, for every position that a step verifies.

A row of a step has its last token and drafts of those that may follow. At each position the
sampler chooses what it would have chosen without drafts, its randomness keyed by seed and
position; a draft is right if it is that token. So drafts change how fast a text comes, and nothing
in it. Nothing here waits for the host, and shapes depend on the batch and on ``Needs`` only: a
CUDA graph can hold it.
"""

import math
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.engine.logprobs import Logprobs, logprobs
from whalefall.engine.request import Request
from whalefall.engine.sampling import MOST_LOGPROBS, SamplingParams
from whalefall.ops.sample import Numbers, accept, adjust, argmax, count, draw
from whalefall.ops.transfer import sent


class Needs(NamedTuple):
    """What the rows of a step make the sampler do; each one differing is another CUDA graph."""

    sampling: bool = False
    """Some temperature is above 0. Without it, and the four below, a token is one argmax."""
    nucleus: bool = False
    """Some row that is sampled has a top_k, top_p or min_p."""
    penalties: bool = False
    bias: bool = False
    mask: bool = False
    """Some row has a grammar."""
    logprobs: int | None = None
    """None, 0, or the most alternatives that may be asked for, so that graphs stay few."""

    @classmethod
    def of(cls, rows: Iterable[SamplingParams]) -> Self:
        rows = list(rows)
        sampled = [row for row in rows if row.temperature > 0]
        asked = [row.logprobs for row in rows if row.logprobs is not None]
        return cls(
            sampling=bool(sampled),
            nucleus=any(row.top_k or row.top_p < 1 or row.min_p for row in sampled),
            penalties=any(map(has_penalties, rows)),
            bias=any(row.logit_bias for row in rows),
            mask=any(row.grammar for row in rows),
            logprobs=(MOST_LOGPROBS if any(asked) else 0) if asked else None,
        )


def has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


class RowSettings:
    """How the sequence in each slot is sampled. One slot more, greedy, for rows that pad a batch.

    Tables over the vocabulary come into being with the first request that needs them: 132 MB each
    for 256 slots of 129,280 words.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size = vocab_size
        self.numbers = torch.tensor([Numbers()] * (slots + 1), device=device)
        """[slots, 7] FP32: ``ops.sample.Numbers``."""
        self.seeds = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.counts: Int[Tensor, "slots vocab"] | None = None
        """Of tokens in prompt and text, as ``ops.sample.adjust`` reads them; choosing adds."""
        self.bias: Float[Tensor, "slots vocab"] | None = None

    def write(self, slot: int, request: Request) -> None:
        """A request moves in, new or to go on after what it has generated."""
        params = request.params
        seed = secrets.randbits(64) if params.seed is None else params.seed
        self.numbers[slot] = self._to_device(self._numbers(params), torch.float32)
        self.seeds[slot] = self._to_device((seed + 2**63) % 2**64 - 2**63, torch.int64)
        if has_penalties(params):
            if self.counts is None:
                self.counts = self._table(torch.int32)
            counts = self.counts[slot].zero_()
            counts.index_fill_(0, self._to_device(request.prompt, torch.int64), 1)
            generated = self._to_device(request.tokens, torch.int64)
            counts.index_add_(0, generated, torch.full_like(generated, 2, dtype=torch.int32))
        if params.logit_bias and self.bias is None:
            self.bias = self._table(torch.float32)
        if self.bias is not None:
            bias = self.bias[slot].zero_()
            tokens = self._to_device([*params.logit_bias], torch.int64)
            values = self._to_device([*params.logit_bias.values()], torch.float32)
            bias.index_copy_(0, tokens, values)

    def _numbers(self, params: SamplingParams) -> Numbers:
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        if params.temperature == 0:
            return Numbers(math.inf, 0, 1, 0, *penalties)
        # Above 0 in FP32 too, so that an impossible token is one at any temperature.
        sharpness = max(1 / params.temperature, 1e-30)
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        return Numbers(sharpness, top_k, params.top_p, params.min_p, *penalties)

    def _table(self, dtype: torch.dtype) -> Tensor:
        return self.numbers.new_zeros(len(self.numbers), self.vocab_size, dtype=dtype)

    def _to_device(self, values: Sequence[float | int] | int, dtype: torch.dtype) -> Tensor:
        return sent(torch.tensor(values, dtype=dtype), self.numbers.device)


class Chosen(NamedTuple):
    tokens: Int[Tensor, "rows width"]
    """What each position's token is if the drafts before it are right."""
    accepted: Int[Tensor, "rows"]
    """Drafts that are, from the first on. A row gains this many tokens and one more."""
    logprobs: Logprobs | None
    """[rows width]"""


def choose(
    logits: Float[Tensor, "rows width vocab"],
    drafts: Int[Tensor, "rows drafts"],
    slots: Int[Tensor, "rows"],
    positions: Int[Tensor, "rows"],
    settings: RowSettings,
    needs: Needs,
    *,
    mask: Int[Tensor, "rows width words"] | None = None,
    verified: Int[Tensor, "rows"] | None = None,
) -> Chosen:
    """Tokens for rows of a step, ``positions`` being those of the first in their sequences.

    Each position of a row sees the drafts before it as if they were right. ``mask`` has the tokens
    that grammars allow (``ops.sample.adjust``). Of a row's drafts the first ``verified`` are real,
    or all. The tokens gained are counted in ``settings``.
    """
    numbers, counts = settings.numbers, settings.counts if needs.penalties else None
    adjusted = logits
    if needs.penalties or needs.bias or mask is not None:
        bias = settings.bias if needs.bias else None
        adjusted = adjust(logits, drafts, slots, numbers, counts=counts, bias=bias, mask=mask)
    if needs.sampling:
        tokens = draw(adjusted, slots, numbers, settings.seeds, positions, nucleus=needs.nucleus)
    else:
        tokens = argmax(adjusted)
    accepted = accept(drafts, tokens, verified)
    if counts is not None:
        count(counts, slots, tokens, accepted)
    scored = None if needs.logprobs is None else logprobs(logits, tokens, needs.logprobs)
    return Chosen(tokens, accepted, scored)
