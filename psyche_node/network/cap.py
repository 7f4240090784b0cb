"""A cap on how many things are open at the same time, in all and per peer. Any thread."""

from __future__ import annotations

import threading
from collections import Counter


class Cap:
    def __init__(self, total: int, per_peer: int) -> None:
        self._total, self._per_peer = total, per_peer
        self._open: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def enter(self, peer: bytes) -> bool:
        """Take a place for ``peer``. Returns False when there is none."""
        with self._lock:
            if self._open.total() >= self._total or self._open[peer] >= self._per_peer:
                return False
            self._open[peer] += 1
            return True

    def count(self, peer: bytes) -> int:
        """Return how many places ``peer`` has."""
        return self._open[peer]

    def leave(self, peer: bytes) -> None:
        with self._lock:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]
