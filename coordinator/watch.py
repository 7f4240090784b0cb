"""When to look at the chain again: pushes wake, deadlines wake, and polling fills in at a pace that fits both."""

from __future__ import annotations

import asyncio
from typing import Final

CLUSTER_SLOT_SECONDS: Final = 0.4
# Until the speed of the chain has been measured, look often.
_UNMEASURED_SECONDS: Final = 0.1
_MEASURE_SECONDS: Final = 0.25
_MEASURE_ANEW_SECONDS: Final = 10.0
_LEAST_SECONDS: Final = 0.02
_POLL_SLOTS: Final = 4
_PUSHED_POLL_SLOTS: Final = 20
_OVERDUE_SLOTS: Final = 2


class Pace:
    """Measures the length of a slot and decides how long to rest between two looks."""

    def __init__(self) -> None:
        self.slot_seconds = CLUSTER_SLOT_SECONDS
        self._measured = False
        self._from: tuple[int, float] | None = None

    def see(self, slot: int) -> None:
        """A slot number that has just been read."""
        now = asyncio.get_running_loop().time()
        if self._from is None or slot < self._from[0]:
            self._from = (slot, now)
            return
        slots, seconds = slot - self._from[0], now - self._from[1]
        if slots > 0 and seconds >= _MEASURE_SECONDS:
            self.slot_seconds = min(max(seconds / slots, 0.001), 10.0)
            self._measured = True
        if seconds >= _MEASURE_ANEW_SECONDS:
            self._from = (slot, now)

    def pause(self, slot: int, due: int | None, *, pushes: bool, idle: bool) -> float:
        """Seconds until the next look if nothing is pushed before.

        Args:
            slot: the current slot.
            due: the slot from which a transition can be made, if it is known.
            pushes: whether changes are pushed, so that polling is only the safety net.
            idle: whether nothing is expected to change.
        """
        if not self._measured:
            return _UNMEASURED_SECONDS
        slots = float(_PUSHED_POLL_SLOTS if pushes else _POLL_SLOTS)
        most = min(max(slots * self.slot_seconds, 0.5 if pushes else 0.1), 5.0)
        if idle:
            return max(most, 1.0)
        if due is None:
            return most
        if slot >= due:
            # Somebody should be ticking: look closely at first, and less so the longer it takes.
            slots = min(_OVERDUE_SLOTS + (slot - due) / 10, _PUSHED_POLL_SLOTS)
            return min(slots * self.slot_seconds, most)
        return min((due - slot) * self.slot_seconds, most)

    async def rest(self, changed: asyncio.Event, slot: int, due: int | None, *, pushes: bool, idle: bool) -> None:
        """Wait for a push or the pause, whichever ends first, and a moment at least: pushes come in bunches."""
        least = max(self.slot_seconds / 2, _LEAST_SECONDS) if self._measured else _LEAST_SECONDS
        await asyncio.sleep(min(least, 0.2))
        pause = self.pause(slot, due, pushes=pushes, idle=idle) - least
        if pause > 0 and not changed.is_set():
            try:
                async with asyncio.timeout(pause):
                    await changed.wait()
            except TimeoutError:
                return
