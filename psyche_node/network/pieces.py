"""Which pieces of a wanted blob are missing, and which source is bringing which. Any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable

_MISSING, _COMING, _HERE = 0, 1, 2


def pack(held: bytes | bytearray) -> bytes:
    """Return the bitmap (bit i of byte i/8) of one byte per piece, which is 0 or not."""
    bits = int("".join("1" if one else "0" for one in reversed(held)) or "0", 2)
    return bits.to_bytes(-(-len(held) // 8), "little")


def unpack(bitmap: bytes, count: int) -> bytes:
    """Return one byte, 0 or 1, for each of ``count`` pieces; what the bitmap does not cover is 0."""
    bits = int.from_bytes(bitmap[: -(-count // 8)], "little") & ((1 << count) - 1)
    return bytes(bit == "1" for bit in reversed(f"{bits:0{count}b}")) if count else b""


class Plan:
    """Hands out runs of missing pieces so that sources bring different ones, and few twice at the very end."""

    def __init__(self, count: int, missing: Iterable[int]) -> None:
        self._state = bytearray([_HERE]) * count
        self._lock = threading.Lock()
        self._bringers: dict[int, list[bytes]] = {}
        self.left = 0
        for index in missing:
            self._state[index] = _MISSING
            self.left += 1

    def take(self, source: bytes, limit: int, held: bytes | None = None, *, again: bool = False) -> range:
        """Return the next run for ``source``, at most ``limit`` pieces; an empty one when there is none for it.

        ``held`` is one byte per piece, not 0 for those that the source has; None is all. ``again`` allows pieces that
        one other source is bringing, once nothing else is left: the last ones of it, since it brings the first first.
        """
        with self._lock:
            first = self._first(held)
            if first >= 0:
                end = first
                while end < len(self._state) and end - first < limit and self._free(end, held):
                    end += 1
                run = range(first, end)
            elif again:
                run = self._second(source, limit, held)
            else:
                return range(0)
            for index in run:
                self._state[index] = _COMING
                self._bringers.setdefault(index, []).append(source)
            return run

    def arrived(self, index: int) -> None:
        """A piece is here."""
        with self._lock:
            if self._state[index] != _HERE:
                self._state[index] = _HERE
                self.left -= 1
            self._bringers.pop(index, None)

    def give_back(self, source: bytes, run: Iterable[int]) -> None:
        """This source does not bring these after all."""
        with self._lock:
            for index in run:
                bringers = self._bringers.get(index, [])
                if source in bringers:
                    bringers.remove(source)
                    if not bringers:
                        del self._bringers[index]
                        self._state[index] = _MISSING

    def has(self, run: Iterable[int]) -> bool:
        """Return whether all of these pieces are here."""
        return all(self._state[index] == _HERE for index in run)

    def untaken(self) -> bool:
        """Return whether there are missing pieces that nobody is bringing."""
        return self._state.find(_MISSING) >= 0

    def _first(self, held: bytes | None) -> int:
        index = self._state.find(_MISSING)
        while index >= 0 and held is not None and not held[index]:
            index = self._state.find(_MISSING, index + 1)
        return index

    def _free(self, index: int, held: bytes | None) -> bool:
        return self._state[index] == _MISSING and (held is None or bool(held[index]))

    def _second(self, source: bytes, limit: int, held: bytes | None) -> range:
        def may(index: int) -> bool:
            bringers = self._bringers.get(index, ())
            return len(bringers) == 1 and source not in bringers and (held is None or bool(held[index]))

        last = max((index for index in self._bringers if may(index)), default=-1)
        if last < 0:
            return range(0)
        first = last
        while first > 0 and last - first + 1 < limit and may(first - 1):
            first -= 1
        return range(first, last + 1)
