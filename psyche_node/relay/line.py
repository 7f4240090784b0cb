"""One direction of a line: when bytes that leave now arrive. Arithmetic only; the clock is the caller's.

What is modelled, for TCP over a line with a tuned window:

- *Rate*: all connections of a direction share it, in the order in which their bytes come. Retransmitted segments take
  their part of it: with loss p, 1 - p of the rate is left.
- *Delay*: half the round trip, plus or minus jitter. TCP delivers in order, so a late segment holds up those behind it.
- *Loss*: a lost segment (1448 bytes) arrives one round trip later, when its retransmission does, which may be lost too.
- *Distance of a connection*: its first byte leaves one round trip late: that is TCP's handshake.
- *reno*: each connection also has a congestion window: 10 segments at first, doubled every round trip until the first
  loss, then one segment more per round trip, and halved by a loss at most once per round trip (RFC 5681). Without it
  losses cost time and not rate, as under BBR.
"""

from __future__ import annotations

import math
import random
from collections import deque

SEGMENT = 1448
_FIRST_WINDOW = 10 * SEGMENT
# Bytes go in blocks of this much time on the line, so that connections take turns and jitter has something to work on.
_BLOCK_SECONDS = 0.002
_AHEAD_SECONDS = 0.005
LARGEST_BLOCK = 256 * 1024
SMALLEST_BLOCK = 4 * 1024
# Bytes under way of a connection on a line without a rate.
UNLIMITED_WINDOW = 64 << 20


class Line:
    """One direction, shared by its connections."""

    def __init__(self, rate: float, rtt: float, jitter: float, loss: float, *, reno: bool, seed: int = 0) -> None:
        """``rate`` in bytes per second, 0 for none; times in seconds; ``loss`` is a share of segments."""
        self.rtt, self.loss, self.reno = rtt, loss, reno
        self.limited = rate > 0
        self._seconds_per_byte = 1.0 / (rate * (1.0 - loss)) if rate else 0.0
        self._delay, self._jitter = rtt / 2, jitter
        self._random = random.Random(seed)
        self._free_at = -math.inf
        block = rate * _BLOCK_SECONDS if rate else LARGEST_BLOCK
        self.block = int(min(max(block, SMALLEST_BLOCK), LARGEST_BLOCK))
        """Most bytes to put on the line at once."""
        longest = self._delay + jitter + (3 * rtt if loss else 0.0)
        self.window = int(rate * longest) + 4 * self.block if rate else UNLIMITED_WINDOW
        """Most bytes of a connection that may be under way: what the line holds, losses included, and a little."""

    def free_at(self) -> float:
        """Return when the line takes more: a little before the last bytes have left, so that it never idles."""
        return self._free_at - _AHEAD_SECONDS

    def send(self, count: int, now: float) -> tuple[float, int]:
        """Put ``count`` bytes on the line. Returns when the last of them arrives, and how often a segment was lost."""
        self._free_at = max(self._free_at, now) + count * self._seconds_per_byte
        lost = self._losses(count)
        jitter = self._random.uniform(-self._jitter, self._jitter) if self._jitter else 0.0
        return self._free_at + self._delay + jitter + lost * self.rtt, lost

    def _losses(self, count: int) -> int:
        """Return how often the unluckiest of the segments was lost: it holds up the rest."""
        if not self.loss:
            return 0
        # All of n segments get through within k retransmissions with probability (1 - loss^(k+1))^n.
        draw, segments, lost = self._random.random(), -(-count // SEGMENT), 0
        while draw >= (1.0 - self.loss ** (lost + 1)) ** segments:
            lost += 1
        return lost


class Lane:
    """One connection's part of a line: in order, within its window."""

    def __init__(self, line: Line, opened: float) -> None:
        """``opened`` is when the connection's first byte may leave."""
        self.line, self._opened = line, opened
        self.under_way = 0
        """Bytes on the line, or arrived and not taken by the receiver."""
        self._last = -math.inf
        self._congestion = _Congestion(line.rtt, line.window) if line.reno else None

    def room(self, now: float) -> int:
        """Return how many bytes may leave now, if the line is free; 0: see ``opens``, or wait until some are taken."""
        if now < self._opened:
            return 0
        room = min(self.line.block, self.line.window - self.under_way)
        if self._congestion is not None:
            room = min(room, self._congestion.room(now))
        return max(0, room)

    def opens(self, now: float) -> float | None:
        """Return when there will be room whatever the receiver does; None: when it takes what has arrived."""
        if now < self._opened:
            return self._opened
        if self._congestion is not None and self.under_way < self.line.window:
            return self._congestion.next_acknowledgement()
        return None

    def send(self, count: int, now: float) -> float:
        """Put ``count`` bytes on the line, at most ``room``. Returns when they arrive."""
        arrives, lost = self.line.send(count, now)
        self.under_way += count
        self._last = max(self._last, arrives)
        if self._congestion is not None:
            self._congestion.sent(count, lost > 0, now, self._last + self.line.rtt / 2)
        return self._last

    def taken(self, count: int) -> None:
        """The receiver has taken bytes that had arrived."""
        self.under_way -= count


class _Congestion:
    """A connection's congestion window, as TCP Reno has it."""

    def __init__(self, rtt: float, largest: int) -> None:
        self._rtt, self._largest = rtt, 2.0 * largest
        self._window, self._threshold = float(_FIRST_WINDOW), math.inf
        self._flight = 0
        self._acknowledgements: deque[tuple[float, int]] = deque()
        self._recovers = -math.inf

    def room(self, now: float) -> int:
        while self._acknowledgements and self._acknowledgements[0][0] <= now:
            count = self._acknowledgements.popleft()[1]
            self._flight -= count
            grown = SEGMENT * count / self._window if self._window >= self._threshold else count
            self._window = min(self._window + grown, self._largest)
        return int(self._window) - self._flight

    def next_acknowledgement(self) -> float | None:
        return self._acknowledgements[0][0] if self._acknowledgements else None

    def sent(self, count: int, lost: bool, now: float, acknowledged: float) -> None:
        self._flight += count
        self._acknowledgements.append((acknowledged, count))
        if lost and now >= self._recovers:
            self._threshold = self._window = max(self._window / 2, 2.0 * SEGMENT)
            self._recovers = now + self._rtt
