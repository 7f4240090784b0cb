"""What becomes of records that are no samples: refused at once, or passed over, counted and remembered."""

from __future__ import annotations

from collections.abc import Callable

from psyche_node.data.errors import BadSample

Bad = Callable[[BadSample], None]
"""Hears of a bad sample: raises it, or returns to go on with the next one."""
_LISTED = 20


def refuse(error: BadSample) -> None:
    """Raise the error: nothing is passed over."""
    raise error


def read_limit(text: str) -> int | None:
    """Return the number of bad samples that ``--skip-bad`` allows; None for ``all``. Raises ValueError."""
    if text != "all" and not text.isdecimal():
        raise ValueError(f"--skip-bad {text} is neither a number nor all")
    return None if text == "all" else int(text)


class Skips:
    """Passes over at most ``limit`` bad samples, or any number of them if it is None.

    Attributes:
        count: how many there were.
        first: the first of them, 20 at most.
    """

    def __init__(self, limit: int | None = 0) -> None:
        self._limit = limit
        self.count = 0
        self.first: list[BadSample] = []

    def __call__(self, error: BadSample) -> None:
        """Raises BadSample if this is one too many."""
        if self._limit is not None and self.count >= self._limit:
            more = (
                f"{self._limit} bad samples before it were passed over; `--skip-bad all` passes over all of them"
                if self._limit
                else "Or let `--skip-bad N` pass over N bad samples, which are counted and listed"
            )
            raise BadSample(error.where, error.what, f"{error.remedy}. {more}") from error
        self.count += 1
        if len(self.first) < _LISTED:
            self.first.append(error)
