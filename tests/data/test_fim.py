import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.data.fim import fim_ids, fim_prompt, joined_tokens, plain_ids, split_joined
from whalefall.data.tokenizer import Tokenizer
from whalefall.errors import UserError

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
SEEDS = st.integers(0, 2**32)


def test_plain_document_is_framed(tokenizer):
    assert plain_ids(tokenizer, "ab") == [0, *tokenizer.encode("ab"), 1]


@given(text=UNICODE, seed=SEEDS)
def test_the_parts_put_together_are_the_document(tokenizer, text, seed):
    ids = fim_ids(tokenizer, text, np.random.default_rng(seed))
    begin, hole, end = tokenizer.fim_ids
    assert ids[:2] == [tokenizer.bos_id, begin]
    assert ids[-1] == tokenizer.eos_id
    at_hole, at_end = ids.index(hole), ids.index(end)
    prefix, suffix, middle = ids[2:at_hole], ids[at_hole + 1 : at_end], ids[at_end + 1 : -1]
    assert "".join(map(tokenizer.decode, (prefix, middle, suffix))) == text
    assert ids[: at_end + 1] == fim_prompt(
        tokenizer, tokenizer.decode(prefix), tokenizer.decode(suffix)
    )


def test_holes_lie_anywhere(tokenizer):
    rng = np.random.default_rng(0)
    hole = tokenizer.fim_ids.hole
    prefixes = [fim_ids(tokenizer, "0a" * 50, rng) for _ in range(200)]
    lengths = [len(tokenizer.decode(ids[: ids.index(hole)])) for ids in prefixes]
    assert min(lengths) < 5
    assert max(lengths) > 80


def test_joined_tokens_are_punctuation_then_line_breaks(tokenizer):
    parts = joined_tokens(tokenizer)
    [joined] = tokenizer.encode("):\n")
    assert parts[joined] == tokenizer.encode("):") + tokenizer.encode("\n")
    for token, split in parts.items():
        text = tokenizer.decode([token])
        assert tokenizer.decode(split) == text
        assert len(split) >= 2
        assert not any(char.isalnum() for char in text)
        assert text.endswith("\n") and not text.startswith("\n")


@given(seed=SEEDS, rate=st.floats(0, 1))
def test_splitting_keeps_the_text(tokenizer, corpus, seed, rate):
    text = random.Random(seed).choice(corpus).text
    ids = tokenizer.encode(text)
    split = split_joined(ids, joined_tokens(tokenizer), np.random.default_rng(seed), rate)
    assert tokenizer.decode(split) == text
    assert len(split) >= len(ids)


def test_share_of_split_tokens_is_the_rate(tokenizer):
    parts = joined_tokens(tokenizer)
    ids = tokenizer.encode("f(x):\n" * 4000)
    rng = np.random.default_rng(0)

    def joined(rate: float) -> int:
        return sum(token in parts for token in split_joined(ids, parts, rng, rate))

    assert joined(0.0) == 4000
    assert joined(1.0) == 0
    assert abs(joined(0.1) - 3600) < 100  # five standard deviations


def test_without_fim_tokens_a_prompt_is_refused(tokenizer):
    bare = Tokenizer(tokenizer._json)
    bare.fim_ids = None
    with pytest.raises(UserError, match="fill-in-the-middle"):
        fim_prompt(bare, "a", "b")
