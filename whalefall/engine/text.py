"""From tokens to text that can be shown: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from whalefall.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class StreamedText:
    """The text of one completion, in pieces that are final once given out.

    Two things are held back: the bytes of a character that is not complete (the pieces of a
    byte-level token may split one), and an end of the text that a stop string may begin with.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        """A stop string was met: the text ended before it."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens_read = 0
        self._undecided: list[int] = []
        """Tokens since the last border between two that is also one between characters."""
        self._held = ""
        """Text not yet given out."""
        self._decoded = 0
        """Characters of the undecided tokens that are in ``_held`` or given out."""

    def read(self, tokens: Sequence[int], *, ended: bool) -> str:
        """The text that became certain. ``tokens`` are all so far, ``ended`` says no more come."""
        if self.stopped:
            return ""
        self._undecided += tokens[self._tokens_read :]
        self._tokens_read = len(tokens)
        self._decode(ended)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        certain = len(self._held) - (0 if ended else self._possible_stop())
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def _decode(self, ended: bool) -> None:
        text = self._tokenizer.decode(self._undecided)
        # UTF-8 decodes from left to right, an incomplete end as one replacement character.
        complete = not text.endswith(_INCOMPLETE)
        certain = text if ended or complete else text[:-1]
        self._held += certain[self._decoded :]
        self._decoded = len(certain)
        if complete:
            self._undecided, self._decoded = [], 0

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
