"""Streamed text: together the text itself, piece by piece whole characters, never a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from whalefall.engine.text import StreamedText

TOKENIZER = Tokenizer.train([], SMALLEST_VOCABULARY)
TEXTS = st.text(alphabet="ab é漢😀\n", max_size=30)


def pieces(tokens: list[int], stop: tuple[str, ...] = (), step: int = 1) -> list[str]:
    """Read token by token, or ``step`` tokens at a time, until a stop string."""
    text, found = StreamedText(TOKENIZER, stop), []
    for end in [*range(step, len(tokens), step), len(tokens)]:
        found.append(text.read(tokens[:end], ended=end == len(tokens)))
        if text.stopped:
            break
    return found


@given(TEXTS, st.integers(1, 4))
def test_characters_are_never_split(text: str, step: int) -> None:
    found = pieces(TOKENIZER.encode(text), step=step)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@given(TEXTS, st.text(alphabet="ab é漢", min_size=1, max_size=4), st.integers(1, 4))
def test_the_text_ends_before_the_stop_string(text: str, stop: str, step: int) -> None:
    found = pieces(TOKENIZER.encode(text), (stop,), step)
    assert "".join(found) == text.partition(stop)[0]


@given(TEXTS, st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), min_size=2, max_size=3))
def test_the_first_of_several_stop_strings_counts(text: str, stops: list[str]) -> None:
    shown = "".join(pieces(TOKENIZER.encode(text), tuple(stops)))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    rest = text[len(shown) :]
    assert not rest or any(rest.startswith(stop) for stop in stops)


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    assert pieces(TOKENIZER.encode("a stop sto"), ("stop",)) == ["a", " ", "", "", "", ""]
    assert pieces(TOKENIZER.encode("sto sun"), ("stop",)) == ["", "", "", "sto ", "", "su", "n"]
    assert pieces(TOKENIZER.encode("né")) == ["n", "", "é"]


def test_what_was_held_back_is_shown_at_the_end() -> None:
    assert "".join(pieces(TOKENIZER.encode("so far, st"), ("stop",))) == "so far, st"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_stays_incomplete_is_shown_as_the_tokenizer_shows_it(cut: int) -> None:
    tokens = TOKENIZER.encode("a😀")[:-cut]
    found = pieces(tokens)
    assert "".join(found) == TOKENIZER.decode(tokens) == "a\ufffd"


@given(st.lists(st.integers(0, SMALLEST_VOCABULARY - 1), max_size=40))
def test_any_tokens_give_the_text_of_the_tokenizer(tokens: list[int]) -> None:
    assert "".join(pieces(tokens)) == TOKENIZER.decode(tokens)
