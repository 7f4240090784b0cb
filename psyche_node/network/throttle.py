"""How many statements a peer may make this node look at. The excess is dropped before anything is verified."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

# A forwarder passes on an announcement and a record of each of up to 256 members at the end of a round, some twice.
STATEMENTS_PER_SECOND = 64.0
STATEMENTS_AT_ONCE = 1024.0
# A refused statement costs its sender as much as this many good ones: a signature was verified for nothing.
REFUSED_COSTS = 32.0
MAX_PEERS = 1024


class Throttle:
    """A bucket of tokens per peer, which hold ``burst`` and refill at ``rate`` a second. Any thread.

    The peers heard of last are remembered; those forgotten begin anew, so memory is bounded whatever comes.
    """

    def __init__(
        self,
        rate: float = STATEMENTS_PER_SECOND,
        burst: float = STATEMENTS_AT_ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[bytes | str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, peer: bytes | str) -> bool:
        """Take a token for one statement of ``peer``; False when there is none."""
        with self._lock:
            left, now = self._level(peer)
            allowed = left >= 1.0
            self._set(peer, left - 1.0 if allowed else left, now)
            return allowed

    def refused(self, peer: bytes | str) -> None:
        """Take the price of a statement that was refused; the peer may owe it, at most one bucket."""
        with self._lock:
            left, now = self._level(peer)
            self._set(peer, max(left - REFUSED_COSTS, -self._burst), now)

    def _level(self, peer: bytes | str) -> tuple[float, float]:
        now = self._clock()
        left, since = self._buckets.get(peer, (self._burst, now))
        return min(self._burst, left + (now - since) * self._rate), now

    def _set(self, peer: bytes | str, left: float, now: float) -> None:
        self._buckets[peer] = (left, now)
        self._buckets.move_to_end(peer)
        if len(self._buckets) > MAX_PEERS:
            self._buckets.popitem(last=False)
