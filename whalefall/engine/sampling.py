"""From logits to tokens: temperature, the nucleus, and randomness that belongs to a position.

A draw is a function of (seed, position in the sequence) and of the row's own logits. What else is
in the batch, and how often it was rearranged, does not change it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Raises UserError where a value is out of range."""

    max_tokens: int = 128
    """Tokens to generate at most."""
    temperature: float = 1.0
    """What the logits are divided by; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens that has this probability."""
    stop: Sequence[str] = ()
    """A text, or several, that end the completion and are not part of it."""
    seed: int | None = None
    """Equal seeds continue equal prompts alike; None draws a seed for each prompt."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if "" in stop:
            raise UserError("stop holds an empty text, which would stop before the first token")


def sample(
    logits: Float[Tensor, "batch vocab"],
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
) -> Int[Tensor, "batch"]:
    """One token a row. ``uniforms`` are the rows' random numbers in [0, 1), see ``uniform``."""
    most_likely = logits.argmax(-1)
    if all(row.temperature == 0 for row in params):
        return most_likely
    # FP64: summed over a large vocabulary, the probabilities of rare tokens outlive rounding.
    temperature = logits.new_tensor([row.temperature or 1.0 for row in params], dtype=torch.float64)
    shifted = (logits - logits.amax(-1, keepdim=True)).double()
    probabilities = (shifted / temperature.unsqueeze(1)).softmax(-1)
    if any(row.top_p < 1 for row in params):
        probabilities = keep_top_p(probabilities, temperature.new_tensor([r.top_p for r in params]))
    # Invert the cumulative distribution; the sum is not 1 once tokens were dropped.
    cumulative = probabilities.cumsum(-1)
    threshold = cumulative[:, -1] * temperature.new_tensor(uniforms)
    drawn = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    is_greedy = torch.tensor([row.temperature == 0 for row in params], device=logits.device)
    return torch.where(is_greedy, most_likely, drawn)


def keep_top_p(
    probabilities: Float[Tensor, "batch vocab"], top_p: Float[Tensor, "batch"]
) -> Float[Tensor, "batch vocab"]:
    """Zero all but the smallest set of most likely tokens whose probabilities reach ``top_p``."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    sum_before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(sum_before >= top_p.unsqueeze(1), 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a position: the output of SplitMix64 at that index.

    A counter-based generator: nothing to store, any position at once (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014). 52 of its bits are used, so that the
    product with any sum of probabilities stays below the sum.
    """
    mask = 2**64 - 1
    # The seed is mixed first: neighbouring seeds must not give the same sequence, shifted.
    mixed = _mix(_mix(seed & mask) + (position + 1) * 0x9E3779B97F4A7C15 & mask)
    return (mixed >> 12) * 2.0**-52


def _mix(x: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers whose every bit reaches all others."""
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
