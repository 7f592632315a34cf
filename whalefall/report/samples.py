"""Samples of the model's writing: held-out documents, continued and filled in."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from whalefall.data.shards import TokenShards
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.generate import generate
from whalefall.engine.sampling import SamplingParams
from whalefall.model.transformer import Transformer
from whalefall.report.records import Sample

_SAMPLES = 3
_LINES = 10
_HOLE_LINES = 2
# Lower than 1, as one samples code: a small network's unlikely tokens are mostly mistakes.
_TEMPERATURE, _TOP_P = 0.4, 0.95

_FUNCTION = re.compile(r"\s*def \w+\(.*\).*:\n")
_NOT_CODE = re.compile(r'\s*($|r?("""|\'\'\'))')  # an empty line or a docstring


class Excerpt(NamedTuple):
    """A few lines of a document, cut in two where a function's body begins."""

    name: str
    before: list[str]
    after: list[str]


def write_samples(
    model: Transformer, tokenizer: Tokenizer, prepared: Path, *, length: int, seed: int = 0
) -> list[Sample]:
    """Continue held-out documents, and fill the hole in the last of them.

    Args:
        model: what writes.
        tokenizer: the one of the data set; without tokens for it nothing is filled in.
        prepared: the data set; documents too short to show a piece of are passed over.
        length: tokens that prompt, completion and suffix have together at most.
        seed: of what is drawn.
    """
    documents = heldout_documents(prepared, tokenizer)
    cuts = list(islice(filter(None, (excerpt(*each) for each in documents)), _SAMPLES))
    quarter = length // 4
    titles, prompts, suffixes = [], [], []
    for number, (name, before, after) in enumerate(cuts, start=1):
        is_filled = number == len(cuts) and tokenizer.fim_ids is not None
        titles.append(f"{name}, a hole filled" if is_filled else f"{name}, continued")
        prompts.append(_last_tokens(tokenizer, before, quarter if is_filled else 2 * quarter))
        rest = "".join(after[_HOLE_LINES:])
        suffixes.append(tokenizer.decode(tokenizer.encode(rest)[:quarter]) if is_filled else None)
    params = SamplingParams(max_tokens=quarter, temperature=_TEMPERATURE, top_p=_TOP_P, seed=seed)
    completions = generate(model, tokenizer, prompts, params, suffixes=suffixes)
    return [
        Sample(title=title, prompt=prompt, completion=completion.text, suffix=suffix or "")
        for title, prompt, completion, suffix in zip(
            titles, prompts, completions, suffixes, strict=True
        )
    ]


def heldout_documents(prepared: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Names and texts of the held-out documents, which no transformation has touched."""
    shards = TokenShards.open(prepared / "heldout")
    ends = np.flatnonzero(np.diff(shards.documents(0, shards.num_tokens), append=-1)) + 1
    start = 0
    for number, end in enumerate(ends.tolist()):
        yield shards.name(number), tokenizer.decode(shards.tokens(start, end).tolist())
        start = end


def excerpt(name: str, text: str) -> Excerpt | None:
    """The first function that has enough around it, else the middle; None if it is too short."""
    lines = text.splitlines(keepends=True)
    cuts = range(_LINES, len(lines) - _LINES)
    if not cuts:
        return None
    bodies = (
        at for at in cuts if _FUNCTION.match(lines[at - 1]) and not _NOT_CODE.match(lines[at])
    )
    at = next(bodies, cuts[len(cuts) // 2])
    return Excerpt(name, lines[at - _LINES : at], lines[at : at + _LINES])


def _last_tokens(tokenizer: Tokenizer, lines: list[str], most: int) -> str:
    """As many whole lines from the end as ``most`` tokens hold."""
    while len(tokenizer.encode("".join(lines))) > most and len(lines) > 1:
        lines = lines[1:]
    return "".join(lines)
