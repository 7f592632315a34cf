"""How a document becomes tokens: plain, or rearranged for fill-in-the-middle (paper 4.1)."""

from collections.abc import Sequence
from unicodedata import category

import numpy as np

from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """``<bos> text <eos>``."""
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def prompt_tokens(tokenizer: Tokenizer, text: str, suffix: str | None = None) -> list[int]:
    """A prompt as documents begin; with a suffix, one that asks for what belongs before it."""
    if suffix is not None:
        return fim_prompt(tokenizer, text, suffix)
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """``<bos> <fim_begin> prefix <fim_hole> suffix <fim_end>``: the model writes the middle next.

    Raises:
        UserError: the tokenizer has no fill-in-the-middle tokens.
    """
    if tokenizer.fim_ids is None:
        raise UserError("the tokenizer has no fill-in-the-middle tokens")
    begin, hole, end = tokenizer.fim_ids
    prefix_ids, suffix_ids = tokenizer.encode(prefix), tokenizer.encode(suffix)
    return [tokenizer.bos_id, begin, *prefix_ids, hole, *suffix_ids, end]


def fim_ids(tokenizer: Tokenizer, text: str, rng: np.random.Generator) -> list[int]:
    """Prefix-suffix-middle: the prompt for a random hole of ``text``, the middle, ``<eos>``."""
    start, stop = sorted(rng.integers(0, len(text), size=2, endpoint=True).tolist())
    prompt = fim_prompt(tokenizer, text[:start], text[stop:])
    return [*prompt, *tokenizer.encode(text[start:stop]), tokenizer.eos_id]


def joined_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Tokens that join punctuation and line breaks, with the tokens of the two parts.

    Such a token never ends a prompt that ends in the punctuation, so a model that saw only joined
    ones is biased at the boundary; splitting a share of them in training mends it (paper 4.1).
    """
    parts: dict[int, list[int]] = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        head = text.rstrip("\r\n")
        if head != text and _is_punctuation(head.removeprefix(" ")):
            parts[token] = tokenizer.encode(head) + tokenizer.encode(text[len(head) :])
    return parts


def split_joined(
    ids: Sequence[int], parts: dict[int, list[int]], rng: np.random.Generator, rate: float
) -> list[int]:
    """Replace a random share ``rate`` of the tokens in ``parts`` by their parts; same text."""
    split: list[int] = []
    for token in ids:
        if token in parts and rng.random() < rate:
            split += parts[token]
        else:
            split.append(token)
    return split


def _is_punctuation(text: str) -> bool:
    # U+FFFD is a symbol itself, but here it stands for a piece of a character.
    return bool(text) and "\ufffd" not in text and all(category(char)[0] in "PS" for char in text)
