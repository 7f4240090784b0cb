"""The server's process: how it runs, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from psyche_node.serving.app import create_app
from psyche_node.serving.connection import Connection
from psyche_node.serving.scheduler import LARGEST_BATCH, Scheduler
from psyche_node.serving.service import Service

if TYPE_CHECKING:
    from psyche_node.generation import Engine

log = logging.getLogger(__name__)

StoppedBy = Callable[[Callable[[], object]], contextlib.AbstractContextManager[None]]

_LAST_SECONDS = 15
"""For answers that were cut off to reach their clients: they end at the next token, which a large model takes a while
for."""
_SPARE_CONNECTIONS = 64
"""Beside those that are answered or wait: health checks, and clients that are being refused."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How to serve.

    Attributes:
        name: what clients call the model.
        longest: tokens of the longest answer.
        waiting: requests that may wait for their turn.
        key: clients must have it; None serves everyone who can connect.
        grace: seconds that answers under way have when the server is told to stop.
    """

    name: str
    longest: int
    waiting: int
    key: str | None = None
    grace: float = 10.0


class _Server(uvicorn.Server):
    """Cuts off the answers that are not finished ``grace`` seconds after it was told to stop, or is told again.

    uvicorn alone would cancel their handlers: a stream would break, and a whole answer would be an error of the server.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._scheduler, self._grace, self._ready = scheduler, grace, ready

    def stop(self) -> None:
        """To be called by a signal's handler, at whatever moment: before it serves, too."""
        if self.should_exit:
            self._scheduler.stop()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are the command's, which hears them from its beginning on."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self._grace, self._scheduler.stop)
        await super().shutdown(sockets)


def serve(engine: Engine, taken: socket.socket, terms: Terms, stopped_by: StoppedBy) -> None:
    """Serve until told to stop, and answers under way are finished or cut off.

    ``stopped_by`` has the function that it is given called, on this thread, to stop it, as long as its context lasts.
    """
    scheduler = Scheduler(engine, terms.waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(scheduler.run())
        yield
        scheduler.stop()
        await running

    app = create_app(Service(engine, terms.name, scheduler, terms.longest), terms.key, lifespan)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Connection,
        ws="none",
        limit_concurrency=terms.waiting + LARGEST_BATCH + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=ceil(terms.grace) + _LAST_SECONDS,
    )
    host, port = taken.getsockname()[:2]
    if terms.key is None and not ipaddress.ip_address(host).is_loopback:
        log.warning("everyone who can reach %s port %d can use this model; --api-key-file asks for a key", host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    server = _Server(config, scheduler, terms.grace, lambda: log.info("%s at %s", terms.name, address))
    with stopped_by(server.stop):
        asyncio.run(server.serve(sockets=[taken]))
