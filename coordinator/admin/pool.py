"""Which positions of the data are still to be trained: what every record's rounds are checked against."""

from __future__ import annotations

from collections.abc import Iterable

Span = tuple[int, int]
"""(start, count) of positions."""


def cut(ranges: Iterable[Span], offset: int, count: int) -> list[Span]:
    """The part [offset, offset + count) of the concatenation of `ranges`."""
    part = []
    for start, size in ranges:
        low, high = max(offset, 0), min(offset + count, size)
        if low < high:
            part.append((start + low, high - low))
        offset -= size
    return part


class Pool:
    """The positions from `cursor` on, and those that came back. Every position is taken once at a time."""

    def __init__(self, cursor: int = 0) -> None:
        self.cursor = cursor
        self._returned: list[Span] = []

    @property
    def returned(self) -> int:
        """Positions that wait to be drawn again."""
        return sum(count for _, count in self._returned)

    def take(self, ranges: Iterable[Span]) -> str | None:
        """Draw these positions; what is wrong with that, or None."""
        for start, count in ranges:
            if start == self.cursor:
                self.cursor += count
            elif start > self.cursor:
                return f"positions from {start} are drawn, yet those from {self.cursor} on were not"
            elif not self._withdraw(start, count):
                return f"positions {start} to {start + count - 1} are drawn again, and had not come back"
        return None

    def give_back(self, ranges: Iterable[Span]) -> None:
        """Positions that were drawn and not trained."""
        self._returned = _merged([*self._returned, *ranges])

    def _withdraw(self, start: int, count: int) -> bool:
        for index, (low, size) in enumerate(self._returned):
            if low <= start and start + count <= low + size:
                rest = [(low, start - low), (start + count, low + size - start - count)]
                self._returned[index : index + 1] = [span for span in rest if span[1]]
                return True
        return False


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, count in sorted(spans):
        if merged and merged[-1][0] + merged[-1][1] == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((start, count))
    return merged
