"""Requests in turn: those that wait while a batch runs become the next batch.

Everything here runs on the server's event loop; only the engine and what listens to it run on another thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from psyche_node.generation import Completion, Request
from psyche_node.serving.errors import ApiError

if TYPE_CHECKING:
    from psyche_node.generation import Engine
    from psyche_node.generation.batch import Listener

log = logging.getLogger(__name__)

LARGEST_BATCH = 16
"""Sequences generated together; the engine's own bound on tokens may make it fewer."""

Event = tuple[int, str, Completion | None]
"""(index of the request, what is new of its text, all of it when this was its end)"""


class Work:
    """The requests of one client, and what has been generated for them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens until all requests have ended. Raises what the engine raised."""
        left = len(self.requests)
        while left:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= event[2] is not None
            yield event

    def cancel(self) -> None:
        """End it at the next token, or before it starts."""
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        """Tell the client that the engine could not do it."""
        self._events.put_nowait(error)

    def listener(self, index: int) -> Listener:
        """What the engine calls, on its thread, for request ``index``."""

        def hear(piece: str, done: Completion | None) -> bool:
            if piece or done is not None:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, piece, done))
            return not self.cancelled

        return hear


class Scheduler:
    """Gives an engine batch after batch.

    Args:
        waiting: requests that may wait; more are refused with 429.
    """

    def __init__(self, engine: Engine, waiting: int) -> None:
        self._engine, self._limit = engine, waiting
        self._queue: deque[tuple[Work, int]] = deque()
        self._running: list[tuple[Work, int]] = []
        self._arrived = asyncio.Event()
        self._stopping = False

    @property
    def load(self) -> dict[str, int]:
        """How many requests are being answered, and how many wait."""
        return {"running": len(self._running), "waiting": len(self._queue)}

    def check(self, count: int) -> None:
        """Raise ApiError if a client's ``count`` requests are too many for the queue, as `submit` would."""
        self._forget_cancelled()
        if self._stopping:
            raise self._end()
        if count > self._limit:
            raise ApiError(400, f"{count} prompts in one request; send at most {self._limit}", param="prompt")
        if len(self._queue) + count > self._limit:
            raise ApiError(
                429,
                f"{len(self._queue)} requests wait already, of {self._limit} that may. Try again in a while",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "5"},
            )

    def submit(self, requests: Sequence[Request]) -> Work:
        """Queue a client's requests. Raises ApiError 429 if they are too many for the queue."""
        self.check(len(requests))
        work = Work(requests)
        self._queue.extend((work, index) for index in range(len(requests)))
        self._arrived.set()
        return work

    async def run(self) -> None:
        """Generate until ``stop``."""
        while not self._stopping:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._generate(batch)

    def stop(self) -> None:
        """End all work; ``run`` returns after the token that is being made."""
        self._stopping = True
        for work, _ in self._running:
            work.cancel()
        for work, _ in self._queue:
            work.cancel()
            work.fail(self._end())
        self._arrived.set()

    def _end(self) -> ApiError:
        return ApiError(503, "the server is stopping", kind="server_error", code="stopping")

    async def _generate(self, batch: list[tuple[Work, int]]) -> None:
        self._running = batch
        requests = [work.requests[index] for work, index in batch]
        listeners = [work.listener(index) for work, index in batch]
        try:
            await asyncio.to_thread(self._engine.run, requests, listeners)
        except Exception as error:  # out of memory, most often: this batch is lost, the server is not
            log.exception("a batch of %d could not be generated", len(batch))
            for work, _ in batch:
                work.fail(error)
        finally:
            self._running = []

    def _take(self) -> list[tuple[Work, int]]:
        """The next batch: in the order of arrival, as many as go together."""
        self._forget_cancelled()
        batch: list[tuple[Work, int]] = []
        while self._queue and len(batch) < LARGEST_BATCH:
            together = [work.requests[index] for work, index in (*batch, self._queue[0])]
            if not self._engine.fits(together):
                break
            batch.append(self._queue.popleft())
        return batch

    def _forget_cancelled(self) -> None:
        self._queue = deque(one for one in self._queue if not one[0].cancelled)
