"""From logits to tokens: what changes the logits, which tokens are left, and a draw among them.

A draw inverts a row's cumulative distribution in whole numbers. Token i weighs

    floor(2^44 exp((logit_i - largest logit) / temperature)),

and whole numbers add up to the same in any order: a token does not depend on how a device cuts
the row into pieces, nor on what else is in the batch. Kernel and plain form differ by the rounding
of ``exp`` alone, which matters to a draw that falls on the border of two tokens.

Rows are sequences and ``width`` the positions of each that are sampled in one step: the one after
its last token, and those after each draft, as if the drafts before were right. What belongs to a
sequence is kept by slots, and ``slots`` says which of them the rows are.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.ops.function import runs_kernel

WEIGHT_BITS = 44
"""The most likely token weighs 2^44, which leaves 2^19 tokens room in 64 bits."""


class Numbers(NamedTuple):
    """The columns of ``numbers``: how a slot is sampled. As they are here, greedily."""

    inverse_temperature: float = math.inf
    top_k: float = 0.0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


def adjust(
    logits: Float[Tensor, "rows width vocab"],
    drafts: Int[Tensor, "rows drafts"],
    slots: Int[Tensor, "rows"],
    numbers: Float[Tensor, "slots 7"],
    *,
    counts: Int[Tensor, "slots vocab"] | None = None,
    bias: Float[Tensor, "slots vocab"] | None = None,
    mask: Int[Tensor, "rows width words"] | None = None,
) -> Float[Tensor, "rows width vocab"]:
    """Logits in FP32 after penalties, bias and mask, each where it is given.

    ``counts`` holds twice the times a token was generated, plus one if the prompt has it; drafts
    before a position count as generated. Bit ``t % 32`` of ``mask[..., t // 32]`` (int32) says that
    token t is allowed.
    """
    if runs_kernel(logits):
        from whalefall.kernels import sample as kernel

        return kernel.adjust(logits, drafts, slots, numbers, counts, bias, mask)
    adjusted = logits.float()
    if counts is not None:
        adjusted = _penalized(adjusted, _history(counts[slots], drafts), numbers[slots])
    if bias is not None:
        adjusted = adjusted + bias[slots].unsqueeze(1)
    if mask is not None:
        token = torch.arange(logits.shape[-1], device=logits.device)
        allowed = (mask[..., token // 32] >> (token % 32)) & 1
        adjusted = adjusted.masked_fill(allowed == 0, -math.inf)
    return adjusted


def draw(
    logits: Float[Tensor, "rows width vocab"],
    slots: Int[Tensor, "rows"],
    numbers: Float[Tensor, "slots 7"],
    seeds: Int[Tensor, "slots"],
    positions: Int[Tensor, "rows"],
    *,
    nucleus: bool,
) -> Int[Tensor, "rows width"]:
    """A token for every position: the most likely (the first, if several tie), or a drawn one.

    ``positions`` are those of the rows' first tokens in their sequences; with a slot's seed they
    give a token its random number. ``nucleus`` says that some row has a top_k, top_p or min_p.
    """
    if runs_kernel(logits):
        from whalefall.kernels import sample as kernel

        return kernel.draw(logits, slots, numbers, seeds, positions, nucleus)
    sharpness, top_k, top_p, min_p, *_ = numbers[slots, None, None].unbind(-1)
    logits = logits.float()
    below = logits - logits.amax(-1, keepdim=True)
    # Where the sharpness is infinite, 0 times it has to be 0.
    likelihoods = torch.where(below < 0, below * sharpness, 0.0).exp()
    weights = weigh(likelihoods)
    if nucleus:
        least = least_likelihood(likelihoods, top_k, top_p, min_p)
        weights = weights.where(likelihoods >= least, 0)
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    ahead = torch.arange(logits.shape[1], device=logits.device)
    random = uniforms(seeds[slots].unsqueeze(1), positions.unsqueeze(1) + ahead).unsqueeze(-1)
    random = random.where(sharpness.isfinite(), 0.0)
    target = torch.minimum((random * total.double()).long(), total - 1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def argmax(logits: Float[Tensor, "*positions vocab"]) -> Int[Tensor, "*positions"]:
    """The most likely token of each position, the first if several tie; NaN is the largest.

    In the type that the logits have: what a draw without temperature gives, in one pass.
    """
    if runs_kernel(logits):
        from whalefall.kernels import sample as kernel

        return kernel.argmax(logits)
    return logits.argmax(-1)


def accept(
    drafts: Int[Tensor, "rows drafts"],
    tokens: Int[Tensor, "rows width"],
    verified: Int[Tensor, "rows"] | None = None,
) -> Int[Tensor, "rows"]:
    """How many drafts of each row are the tokens chosen in their places, from the first on.

    Of a row's drafts the first ``verified`` are real, or all.
    """
    if drafts.is_cuda:
        from whalefall.kernels import sample as kernel

        return kernel.accept(drafts, tokens, verified)
    if not drafts.shape[1]:
        return tokens.new_zeros(len(tokens))
    right = drafts == tokens[:, :-1]
    if verified is not None:
        right &= torch.arange(drafts.shape[1], device=drafts.device) < verified.unsqueeze(1)
    return right.long().cumprod(1).sum(1)


def weigh(likelihoods: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Likelihoods, relative to the most likely token's, as whole numbers."""
    return (likelihoods * 2.0**WEIGHT_BITS).long()


def least_likelihood(
    likelihoods: Float[Tensor, "*rows vocab"],
    top_k: Float[Tensor, "*#rows 1"],
    top_p: Float[Tensor, "*#rows 1"],
    min_p: Float[Tensor, "*#rows 1"],
) -> Float[Tensor, "*rows 1"]:
    """What a token's likelihood, relative to the largest, must be for the token to be kept.

    The rules as in ``transformers``: first the ``top_k`` most likely tokens are kept; of those the
    fewest most likely that have ``top_p`` of their probability; of those the ones as likely as
    ``min_p``. Tokens that tie with the last one kept are kept too.
    """
    ordered = _descending(likelihoods)
    vocab = likelihoods.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab).long().clamp(max=vocab) - 1
    of_top_k = ordered.gather(-1, last.expand(*ordered.shape[:-1], 1))
    cumulative = weigh(ordered).where(ordered >= of_top_k, 0).cumsum(-1)
    total = cumulative[..., -1:]
    needed = torch.minimum((top_p.double() * total).ceil().long(), total)
    of_top_p = ordered.gather(-1, (cumulative < needed).sum(-1, keepdim=True))
    return torch.maximum(torch.maximum(of_top_k, of_top_p), min_p)


def count(
    counts: Int[Tensor, "slots vocab"],
    slots: Int[Tensor, "rows"],
    tokens: Int[Tensor, "rows width"],
    accepted: Int[Tensor, "rows"],
) -> None:
    """Add to ``counts``, as ``adjust`` reads them, each row's first ``accepted + 1`` tokens."""
    gained = torch.arange(tokens.shape[1], device=tokens.device) <= accepted.unsqueeze(1)
    at = slots.long().unsqueeze(1) * counts.shape[1] + tokens
    counts.view(-1).scatter_add_(0, at.flatten(), (2 * gained).to(counts.dtype).flatten())


def uniforms(
    seeds: Int[Tensor, "*#shape"], positions: Int[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """``engine.sampling.uniform`` of int64 tensors: the same numbers, as FP64, bit for bit."""
    step = 0x9E3779B97F4A7C15 - 2**64  # as a signed number; products wrap around
    mixed = _mix(_mix(seeds) + (positions.long() + 1) * step)
    return _shifted(mixed, 12).double() * 2.0**-52


def _descending(x: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    if x.is_cpu:  # NumPy sorts without indices, four times as fast
        return torch.from_numpy(np.sort(x.numpy())).flip(-1)
    return x.sort(dim=-1, descending=True).values


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right as unsigned numbers are: with zeros from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _history(
    counts: Int[Tensor, "rows vocab"], drafts: Int[Tensor, "rows drafts"]
) -> Int[Tensor, "rows width vocab"]:
    """The counts before each position of a row."""
    width = drafts.shape[1] + 1
    history = counts.unsqueeze(1).repeat(1, width, 1)
    for before in range(width - 1):
        seen = drafts[:, before, None, None].expand(-1, width - before - 1, 1)
        history[:, before + 1 :].scatter_add_(2, seen, torch.full_like(seen, 2).to(counts.dtype))
    return history


def _penalized(
    logits: Float[Tensor, "rows width vocab"],
    history: Int[Tensor, "rows width vocab"],
    numbers: Float[Tensor, "rows 7"],
) -> Float[Tensor, "rows width vocab"]:
    *_, presence, frequency, repetition = numbers[:, None, None].unbind(-1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(history > 0, repeated, logits)
    generated = history >> 1
    return logits - (frequency * generated + torch.where(generated > 0, presence, 0.0))
