"""What becomes of records that are no samples: refused at once, or passed over, counted and remembered."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from psyche_node.data.errors import BadSample
from psyche_node.units import counted

Bad = Callable[[BadSample], None]
"""Hears of a bad sample: raises it, or returns to go on with the next one."""
_REASONS = 20
_PLACES = 3
_NUMBER = re.compile(r"\d+")


@dataclass(slots=True)
class Reason:
    """Bad samples alike: ``what`` is wrong with the first and its remedy, how many there are, and where the first are.

    Alike are those whose messages differ in numbers only, such as that of a column.
    """

    what: str
    count: int = 0
    places: list[str] = field(default_factory=list)
    remedy: str = ""

    def __str__(self) -> str:
        """How many, what, where, and the remedy. A place names its file where it is not that of the one before."""
        named, before = list[str](), ""
        for place in self.places:
            file, _, number = place.rpartition(":")
            named.append(number if file == before else place)
            before = file
        more = f" and {self.count - len(named):,} more" if self.count > len(named) else ""
        return f"{self.count:,}: {self.what} ({', '.join(named)}{more})" + (f". {self.remedy}" if self.remedy else "")


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
        reasons: what was wrong with them, in the order of finding; beyond 20 reasons they are "other".
    """

    def __init__(self, limit: int | None = 0) -> None:
        self._limit = limit
        self.count = 0
        self._reasons: dict[str, Reason] = {}

    @property
    def reasons(self) -> list[Reason]:
        return list(self._reasons.values())

    def __call__(self, error: BadSample) -> None:
        """Raises BadSample if this is one too many."""
        if self._limit is not None and self.count >= self._limit:
            more = (
                f"Passed over before it: {counted(self._limit, 'bad sample')}; `--skip-bad all` passes over all of them"
                if self._limit
                else "Or let `--skip-bad N` pass over N bad samples, which are counted and listed by reason"
            )
            raise BadSample(error.where, error.what, f"{error.remedy}. {more}") from error
        self.count += 1
        alike = _NUMBER.sub("#", error.what)
        full = alike not in self._reasons and len(self._reasons) >= _REASONS
        key, what, remedy = ("", "other reasons", "") if full else (alike, error.what, error.remedy)
        reason = self._reasons.setdefault(key, Reason(what, remedy=remedy))
        reason.count += 1
        if len(reason.places) < _PLACES:
            reason.places.append(error.where)
