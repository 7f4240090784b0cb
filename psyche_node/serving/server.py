"""The server's process: its address, its key file, its end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette

from psyche_node.serving.app import create_app
from psyche_node.serving.connection import Connection
from psyche_node.serving.errors import ServeError
from psyche_node.serving.scheduler import LARGEST_BATCH, Scheduler
from psyche_node.serving.service import Service

if TYPE_CHECKING:
    from psyche_node.generation import Engine

log = logging.getLogger(__name__)

StoppedBy = Callable[[Callable[[], object]], contextlib.AbstractContextManager[None]]

_SHORTEST_KEY = 16
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


def bind(host: str, port: int) -> socket.socket:
    """Take an address, before a large model is loaded for nothing; connections are refused until it is.

    Raises:
        ServeError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        raise ServeError(f"cannot listen on {host} port {port}: {error}. Choose another --host or --port") from None
    return taken


def read_key(path: Path) -> str:
    """Return the API key in a file of mode 0600.

    Raises:
        ServeError: others can read the file, or what it holds is no key.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ServeError(f"{path} has mode {mode:04o}: others can read the key. Run: chmod 600 {path}")
            key = file.read(4097).strip()
    except OSError as error:
        raise ServeError(f"the key file {path} cannot be read: {error.strerror}") from None
    if not _SHORTEST_KEY <= len(key) <= 4096 or not all(33 <= byte <= 126 for byte in key):
        raise ServeError(
            f"{path} holds no key: it must be one line of at least {_SHORTEST_KEY} letters and digits. "
            f"Make one: (umask 077; openssl rand -hex 32 > {path})"
        )
    return key.decode("ascii")


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
