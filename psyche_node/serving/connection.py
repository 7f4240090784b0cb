"""Connections on which nothing happens make way for those that ask something."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """A connection of uvicorn's. One too many ends the one that has been idle longest.

    uvicorn counts idle ones against ``limit_concurrency``, and waits for a first request for ever: whoever opens as
    many and sends nothing would lock all others out. Where all are busy its own answer, 503, remains.
    """

    idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        present = [one for one in self.connections if not one.transport.is_closing()]
        if self.limit_concurrency is None or len(present) < self.limit_concurrency:
            return
        idle = [one for one in present if isinstance(one, Connection) and one is not self and one._idle]
        if idle:
            min(idle, key=lambda one: one.idle_since).transport.abort()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def _idle(self) -> bool:
        """Whether no request is under way. One whose head has not come to its end is none yet."""
        return self.cycle is None or self.cycle.response_complete
