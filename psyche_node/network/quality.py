"""How well each peer serves: speed, latency, failures in a row; and whom to leave alone for a while. Any thread.

What is measured here decides between sources and never whether bytes are right: that is the hashes' work.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from psyche_node.identity import node_id

log = logging.getLogger(__name__)
MAX_PEERS = 512
# The weight of the newest measurement.
_NEW = 0.3
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# Before anything has been measured: a peer on a middling line.
_SPEED, _LATENCY = 8e6, 0.05
# A peer is slow when it brings less than this share of what is usual.
SLOW_SHARE = 1 / 8
_SMALLEST = 64 * 1024
_WINDOW = 4.0
# No line is taken for slower than this because little came in: it may be that nobody sent much.
_SMALLEST_LINE = 4e6


@dataclass(slots=True)
class _Peer:
    speed: float | None = None
    latency: float | None = None
    failures: int = 0
    absent: bool = False
    """Whether they were all failures to reach it."""
    avoid_until: float = 0.0
    slow: bool = False


class Quality:
    """Estimates per peer, bounded in number; the peer not heard of for longest is forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()
        self._lock = threading.Lock()
        self._usual: float | None = None
        self._usual_latency: float | None = None
        self._inflow: tuple[float, float] = (0.0, clock())
        self._streams, self._line = 0, 0.0

    def served(self, key: bytes, count: int, seconds: float) -> None:
        """Take note of ``count`` bytes that a stream of this peer brought in ``seconds``."""
        with self._lock:
            peer = self._peer(key)
            peer.failures, peer.avoid_until = 0, 0.0
            if count < _SMALLEST or seconds <= 0:
                return
            speed = count / seconds
            peer.speed = _blend(peer.speed, speed)
            self._usual = _blend(self._usual, speed)
            slow = peer.speed < self._usual * SLOW_SHARE
            changed, peer.slow = slow != peer.slow, slow
            usual = self._usual
        if changed:
            log.info(
                "%s is %s: %.1f MB/s, %.1f MB/s is usual", node_id(key), "slow" if slow else "slow no more",
                speed / 1e6, usual / 1e6,
            )  # fmt: skip

    def answered(self, key: bytes, seconds: float) -> None:
        """Take note of the time to a first answer."""
        with self._lock:
            peer = self._peer(key)
            peer.latency = _blend(peer.latency, seconds)
            self._usual_latency = _blend(self._usual_latency, seconds)

    def heard(self, key: bytes) -> None:
        """It called this node, so it is up. What it did wrong when it was reached stays."""
        with self._lock:
            if (peer := self._peers.get(key)) is not None and peer.absent:
                peer.failures, peer.avoid_until, peer.absent = 0, 0.0, False

    def failed(self, key: bytes, reason: str, *, absent: bool = False) -> None:
        """Take note of a failure that is the peer's; it is avoided for a time that doubles with each in a row.

        ``absent``: it could not be reached.
        """
        with self._lock:
            peer = self._peer(key)
            peer.absent = absent and (peer.absent or not peer.failures)
            peer.failures += 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(peer.failures - 1, 8))
            peer.avoid_until = self._clock() + pause
            failures = peer.failures
        level = logging.WARNING if failures == 3 else logging.INFO
        log.log(level, "avoiding %s for %.0f s, failure %d in a row: %s", node_id(key), pause, failures, reason)

    def avoided(self, key: bytes) -> bool:
        """Return whether the peer failed a short time ago."""
        peer = self._peers.get(key)
        return peer is not None and peer.avoid_until > self._clock()

    def seconds_for(self, key: bytes, count: int) -> float:
        """Return how long ``count`` bytes would take from this peer, by what is known."""
        peer = self._peers.get(key) or _Peer()
        return (_LATENCY if peer.latency is None else peer.latency) + count / self.speed(key)

    def speed(self, key: bytes) -> float:
        """Return bytes a second of a stream from this peer; what is usual when it has not been measured."""
        peer = self._peers.get(key)
        if peer is not None and peer.speed is not None:
            return peer.speed
        return self.usual()

    def usual(self) -> float:
        """Return bytes a second of a usual stream, whosoever it is from."""
        return self._usual or _SPEED

    def usual_latency(self) -> float:
        """Return the usual seconds to a first answer."""
        return _LATENCY if self._usual_latency is None else self._usual_latency

    def arrived(self, count: int) -> None:
        """Take note of bytes of any blob from anybody."""
        with self._lock:
            self._inflow = (self._decayed() + count, self._clock())
            self._line = max(self._line, self._inflow[0] / _WINDOW)

    def inflow(self) -> float:
        """Return bytes a second that arrive here, all sources together, over the last seconds."""
        with self._lock:
            return self._decayed() / _WINDOW

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream as open in the block."""
        with self._lock:
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def share(self) -> float:
        """Return bytes a second of a usual stream while as many as are open share this node's line.

        The line is what came in at best. On a slow one a peer is not to blame for what the others take.
        """
        return min(self.usual(), max(self._line, _SMALLEST_LINE) / max(1, self._streams))

    def _decayed(self) -> float:
        total, since = self._inflow
        return total * math.exp(-(self._clock() - since) / _WINDOW)

    def _peer(self, key: bytes) -> _Peer:
        peer = self._peers.pop(key, None) or _Peer()
        self._peers[key] = peer
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return peer


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _NEW * (new - old)
