"""Trio's clock without the time in which this process stood still, as on a machine that was held up or overloaded."""

from __future__ import annotations

import time

from trio.abc import Clock

# Seconds that a look at the clock can be later than the one before. Trio looks at it in every turn of its loop.
STEP = 0.25


class AwakeClock(Clock):
    """A deadline that lies seconds ahead does not pass in a single step, before anybody could keep it."""

    def start_clock(self) -> None:
        self._now, self._seen = 0.0, time.monotonic()

    def current_time(self) -> float:
        seen = time.monotonic()
        self._now += min(seen - self._seen, STEP)
        self._seen = seen
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return min(deadline - self.current_time(), STEP)
