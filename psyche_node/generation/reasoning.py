"""Telling reasoning from answer: ``<think>...</think>`` before what is said.

A reply reasons if it begins with the mark, or if its prompt ended with it, as some templates have it.
"""

from __future__ import annotations

from typing import NamedTuple

from psyche_node.generation.text import may_begin

BEGIN, END = "<think>", "</think>"
SEED_BEGIN, SEED_END = "<seed:think>", "</seed:think>"
_PAIRS = {BEGIN: END, SEED_BEGIN: SEED_END}
MARKS = (BEGIN, END, SEED_BEGIN, SEED_END)


class Parts(NamedTuple):
    """A piece of a reply, or all of it."""

    reasoning: str
    answer: str


def begins_inside(prompt: str) -> str | None:
    """Return the mark that opens reasoning if a prompt ends with one."""
    return next((mark for mark in _PAIRS if prompt.rstrip().endswith(mark)), None)


def split_reasoning(text: str, inside: str | None = None) -> Parts:
    """Return (reasoning, answer) of a whole reply, without the marks and the blank lines around them.

    Without a closing mark all of it is reasoning: the reply was cut off before its answer. ``inside``: see
    ``begins_inside``.
    """
    splitter = ReasoningSplitter(inside)
    first, rest = splitter.feed(text), splitter.finish()
    return Parts((first.reasoning + rest.reasoning).strip(), (first.answer + rest.answer).strip())


class ReasoningSplitter:
    """Splits a reply while it comes; what may be part of a mark waits."""

    def __init__(self, inside: str | None = None) -> None:
        self._end = _PAIRS[inside] if inside is not None else None
        self._started = inside is not None
        self._fresh = True  # nothing but blanks so far in this part
        self._held = ""

    def feed(self, piece: str) -> Parts:
        """Return what is new of (reasoning, answer)."""
        self._held += piece
        if not self._started and not self._start():
            return Parts("", "")
        if self._end is None:
            text, self._held = self._held, ""
            return Parts("", self._trimmed(text))
        place = self._held.find(self._end)
        if place < 0:
            size = len(self._held) - may_begin(self._held, [self._end])
            text, self._held = self._held[:size], self._held[size:]
            return Parts(self._trimmed(text), "")
        reasoning = self._trimmed(self._held[:place])
        text, self._held = self._held[place + len(self._end) :], ""
        self._end, self._fresh = None, True
        return Parts(reasoning, self._trimmed(text))

    def finish(self) -> Parts:
        """Return what was waiting for the rest of a mark that did not come."""
        text, self._held = self._held, ""
        self._started = True
        text = self._trimmed(text)
        return Parts(text, "") if self._end is not None else Parts("", text)

    def _start(self) -> bool:
        """Find out whether the reply begins with a mark; False while it cannot be told."""
        text = self._held.lstrip()
        for mark, end in _PAIRS.items():
            if text.startswith(mark):
                self._end, self._held, self._started = end, text[len(mark) :], True
                return True
        self._started = not any(mark.startswith(text) for mark in _PAIRS)
        return self._started

    def _trimmed(self, text: str) -> str:
        """Leave out the blanks that a part begins with."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text
