"""From tokens to text, a token at a time: characters that are whole, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


def may_begin(text: str, marks: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of one of ``marks``."""
    for size in range(min(len(text), max(map(len, marks), default=1) - 1), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


class Detokenizer:
    """Decodes ids as they come; what is not a whole character yet waits.

    The pieces joined are the text of all ids: some tokenizers drop or add a space at the beginning of what they
    decode, so each step decodes from the last step's beginning and takes what is new.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._read = 0

    def feed(self, token: int) -> str:
        """Return the text that became whole with this token; often one word, sometimes nothing."""
        self._ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """Return what was waiting: half a character becomes U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]


class StopText:
    """Passes text on until a stop string; what may become one waits."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """Return the text that can be shown now. After a stop string was found: nothing more."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for mark in self._stop if (place := text.find(mark)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        waiting = may_begin(text, self._stop)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting]

    def finish(self) -> str:
        """Return what was waiting."""
        held, self._held = self._held, ""
        return held
