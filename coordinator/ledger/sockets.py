"""One WebSocket connection: its place among all, and the queue of what waits to be sent to it.

A client that does not read as fast as it is sent to is disconnected when its queue is full; it never holds up the
ledger or the other clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection

from coordinator.ledger.descriptors import Room
from coordinator.ledger.faults import Chance

log = logging.getLogger(__name__)

MAX_QUEUED: Final = 2048
MAX_QUEUED_BYTES: Final = 16 * 2**20

WhenDurable = Callable[[Callable[[], None]], None]


class Socket(ServerConnection):
    """A connection that takes a place in `room` when it is accepted: its handshake may never come."""

    room: Room
    _has_place = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._has_place = self.room.take()
        if self._has_place:
            super().connection_made(transport)
        else:
            # Without the task that would serve it.
            Connection.connection_made(self, transport)
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._has_place:
            self._has_place = False
            self.room.leave()


class Client:
    """What is sent over one connection.

    Args:
        socket: the connection.
        when_durable: calls a function once everything that the bank has executed is durable.
        chance: how long a message takes on its way.
    """

    def __init__(self, socket: ServerConnection, when_durable: WhenDurable, chance: Chance) -> None:
        self.socket = socket
        self.dropped = False
        self._when_durable = when_durable
        self._chance = chance
        self._queue: deque[tuple[float, str]] = deque()
        self._unsent = 0
        self._unsent_bytes = 0
        self._waiting = asyncio.Event()

    def push(self, text: str) -> None:
        """Have a message sent, in order. What a client learns is durable first."""
        if self._reserve(len(text)):
            self._when_durable(partial(self._enqueue, text))

    async def write(self) -> None:
        """Send what is queued, until cancelled. Raises ConnectionClosed when the connection ends."""
        loop = asyncio.get_running_loop()
        while True:
            while self._queue:
                due, text = self._queue.popleft()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self.socket.send(text)
                self._unsent -= 1
                self._unsent_bytes -= len(text)
            self._waiting.clear()
            await self._waiting.wait()

    def _reserve(self, size: int) -> bool:
        """Room for a message of this many bytes, from when it is made until it is sent. False: the client is dropped.

        What waits for the disk counts too: it is all made before the first of it is queued.
        """
        if self.dropped:
            return False
        if self._unsent >= MAX_QUEUED or self._unsent_bytes + size > MAX_QUEUED_BYTES:
            log.warning("a WebSocket client is too slow: disconnected with %d messages unsent", self._unsent)
            self.dropped = True
            self._queue.clear()
            self.socket.transport.abort()
            return False
        self._unsent += 1
        self._unsent_bytes += size
        return True

    def _enqueue(self, text: str) -> None:
        # The delay is one way of the two that a request takes.
        delay = self._chance.half_delay("push")
        if not self.dropped:
            self._queue.append((asyncio.get_running_loop().time() + delay if delay else 0.0, text))
            self._waiting.set()
