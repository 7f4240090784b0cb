"""Whose turn it is: downloads wait for a slot, the most urgent first; uploads let more urgent ones go ahead."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable

import trio

from psyche_node.network.messages import Kind

# The longest that one piece of a less urgent upload waits: it slows down, and does not starve.
YIELD_SECONDS = 1.0
# An upload that has moved nothing for so long holds up nobody: its reader may have stopped.
ACTIVE_SECONDS = 2.0
Rank = tuple[int, int]


def rank(kind: Kind, round: int, current: int) -> Rank:
    """Return how urgent a blob is, the lowest first: this round's updates, older ones, checkpoints, models."""
    if kind is Kind.UPDATE:
        return (0, 0) if round >= current else (1, current - round)
    return (2 if kind is Kind.CHECKPOINT else 3, 0)


class Slots:
    """A number of slots, given to the lowest rank that waits; equals in the order in which they came. On trio.

    Besides, the weights of those who hold one are at most ``capacity()`` together, which may change.
    """

    def __init__(self, count: int, capacity: Callable[[], float] = lambda: math.inf) -> None:
        self._free, self._capacity = count, capacity
        self._held = 0.0
        self._waiting: list[tuple[Rank, int, float, trio.Event]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def slot(self, rank: Rank, weight: float = 1.0) -> AsyncIterator[None]:
        """Hold a slot in the block."""
        await self._enter(rank, weight)
        try:
            yield
        finally:
            self._give_back(weight)

    async def _enter(self, rank: Rank, weight: float) -> None:
        entry = (rank, next(self._numbers), weight, trio.Event())
        heapq.heappush(self._waiting, entry)
        self.pass_on()
        try:
            await entry[3].wait()
        except trio.Cancelled:
            if entry[3].is_set():
                self._give_back(weight)
            else:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
            raise

    def _give_back(self, weight: float) -> None:
        self._free += 1
        self._held -= weight
        self.pass_on()

    def pass_on(self) -> None:
        """Give out what is free; to be called when the capacity may have grown."""
        while self._free and self._waiting and self._held + self._waiting[0][2] <= self._capacity():
            _, _, weight, event = heapq.heappop(self._waiting)
            self._free -= 1
            self._held += weight
            event.set()


class Turns:
    """The open uploads by urgency. Each asks before each piece whether others go first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._open: dict[int, tuple[int, float]] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._clock = clock

    def enter(self, rank: Rank) -> int:
        """Count an upload as open. Returns its number."""
        with self._changed:
            number = next(self._numbers)
            self._open[number] = (rank[0], self._clock())
            return number

    def leave(self, number: int) -> None:
        with self._changed:
            self._open.pop(number, None)
            self._changed.notify_all()

    def wait(self, number: int, seconds: float = YIELD_SECONDS) -> bool:
        """Wait until nothing more urgent is moving, at most ``seconds``. Returns whether that is so.

        The caller sends a piece next, and so counts as moving.
        """
        now = self._clock()
        until = now + seconds
        with self._changed:
            mine = self._open.get(number, (0, now))[0]
            while (others := self._moving(mine, now)) and now < until:
                self._changed.wait(min(until, others) - now)
                now = self._clock()
            if number in self._open:
                self._open[number] = (mine, now)
            return not others

    def _moving(self, urgency: int, now: float) -> float:
        """Return until when there are more urgent uploads that move, as far as is known; 0 when there are none."""
        until = max((moved for other, moved in self._open.values() if other < urgency), default=-1.0) + ACTIVE_SECONDS
        return until if until > now else 0.0
