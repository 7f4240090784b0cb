"""Solana's WebSocket subscriptions over one connection that is kept alive: reconnects, re-subscribes, says so.

The connection is to the preferred endpoint whose WebSocket works, and returns there when it is back.

A push is a hint that something changed. Nothing depends on one arriving: who subscribes also polls, more often while
`connected` is false.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidURI, WebSocketException

from coordinator.jsonrpc import Json
from coordinator.urls import shown_url, websocket_url

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES: Final = 2 * 2**20
_FIRST_PAUSE: Final = 0.25
_LONGEST_PAUSE: Final = 10.0
# A connection that lived this long was a good one: the next pause starts small again.
_GOOD_SECONDS: Final = 5.0
_PING_SECONDS: Final = 10.0
# While on another than the preferred endpoint, the preferred one is tried this often.
_RETURN_SECONDS: Final = 30.0
_RETURNING: Final = "a preferred endpoint is back"
_FRAME_BYTES: Final = 4

Push = Callable[[Json], None]


@dataclass(slots=True)
class _Wanted:
    """`push` gets the notification's value, or None after a reconnect: something may have been missed."""

    kind: str
    params: list[Any]
    push: Push
    server_id: int | None = None


@dataclass(slots=True)
class _Site:
    url: str
    failures: int = 0
    retry_at: float = 0.0


class Subscriptions:
    """The subscriptions of one client. Connects at the first `subscribe`.

    Args:
        rpc_urls: the RPC endpoints, in order of preference; their WebSockets are found by Solana's rule.
    """

    def __init__(self, rpc_urls: Sequence[str]) -> None:
        self._sites = [_Site(websocket_url(url)) for url in rpc_urls]
        self._reason = ""
        self._url = ""
        self._wanted: dict[int, _Wanted] = {}
        self._requests: dict[int, tuple[int, str]] = {}
        """Handle and kind of what was asked for and has not been confirmed; it may no longer be wanted by then."""
        self._identities = itertools.count(1)
        self._by_server_id: dict[int, int] = {}
        self._socket: ClientConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self.received = 0
        """Bytes of all messages so far."""
        # Sends are queued by one task, so that `subscribe` needs no await and the order of requests is kept.
        self._outgoing: asyncio.Queue[str] = asyncio.Queue()

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def connected_to(self) -> str | None:
        """The URL of the WebSocket that is open now."""
        return self._url if self._socket is not None else None

    def subscribe(self, kind: str, params: list[Any], push: Push) -> int:
        """Ask for `kind` ("account", "signature", ...) notifications; returns a handle for `unsubscribe`."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep_connected())
        handle = next(self._identities)
        self._wanted[handle] = _Wanted(kind, params, push)
        if self._socket is not None:
            self._request(handle)
        return handle

    def unsubscribe(self, handle: int) -> None:
        """Forget a subscription. Does nothing if it is gone already."""
        wanted = self._wanted.pop(handle, None)
        if wanted is None or wanted.server_id is None:
            return
        self._by_server_id.pop(wanted.server_id, None)
        if self._socket is not None:
            self._end(wanted.kind, wanted.server_id)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    # ------------------------------------------------------------------ the connection

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            # The first that is not in a pause: the order is one of preference.
            site = min(self._sites, key=lambda one: max(one.retry_at - now, 0.0))
            if site.retry_at > now:
                await asyncio.sleep(site.retry_at - now)
            started = loop.time()
            try:
                await self._connection(site)
                reason = self._reason or "closed by the endpoint"
            except (OSError, TimeoutError, WebSocketException, InvalidURI, ValueError) as error:
                reason = self._reason or str(error) or type(error).__name__
            self._reason = ""
            if reason == _RETURNING:
                continue
            site.failures = 1 if loop.time() - started > _GOOD_SECONDS else site.failures + 1
            pause = min(_FIRST_PAUSE * 2 ** min(site.failures - 1, 10), _LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            site.retry_at = loop.time() + pause
            # The 1st, 2nd, 4th, 8th in a row: an endpoint that stays away is no news every time.
            level = logging.WARNING if site.failures.bit_count() == 1 else logging.DEBUG
            words = "%s: WebSocket lost (%s); polling, next attempt there in %.1f s"
            log.log(level, words, shown_url(site.url), reason, pause)

    async def _connection(self, site: _Site) -> None:
        async with self._connect(site.url) as socket:
            self._outgoing = asyncio.Queue()
            self._requests.clear()
            self._by_server_id.clear()
            self._socket, self._url = socket, site.url
            if site.failures:
                log.info("%s: WebSocket connected again", shown_url(site.url))
            beside = [asyncio.create_task(self._write(socket)), asyncio.create_task(self._return(site))]
            try:
                for handle, wanted in tuple(self._wanted.items()):
                    wanted.server_id = None
                    self._request(handle)
                async for message in socket:
                    self._read(message)
            finally:
                self._socket = None
                for wanted in self._wanted.values():
                    wanted.server_id = None
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)

    def _connect(self, url: str) -> connect:
        # Pings find a connection that is dead without a word: a cable pulled, a firewall that forgot it.
        return connect(
            url,
            max_size=MAX_MESSAGE_BYTES,
            compression=None,
            close_timeout=1,
            open_timeout=10,
            ping_interval=_PING_SECONDS,
            ping_timeout=_PING_SECONDS,
        )

    async def _return(self, site: _Site) -> None:
        """While connected to an endpoint that is not the preferred one, see whether a better one is back."""
        better = self._sites[: self._sites.index(site)]
        while better:
            await asyncio.sleep(_RETURN_SECONDS * random.uniform(0.75, 1.25))
            for one in better:
                try:
                    async with self._connect(one.url):
                        pass
                except (OSError, TimeoutError, WebSocketException, InvalidURI, ValueError):
                    continue
                one.retry_at = 0.0
                log.info("%s: WebSocket is back and preferred", shown_url(one.url))
                self.distrust(_RETURNING)
                return

    def distrust(self, reason: str) -> None:
        """Give the present connection up and make a new one."""
        if self._socket is not None:
            self._reason = reason
            self._socket.transport.abort()

    def confirmed(self, handle: int | None) -> bool:
        """Whether a subscription stands now."""
        wanted = self._wanted.get(handle) if handle is not None else None
        return self._socket is not None and wanted is not None and wanted.server_id is not None

    async def _write(self, socket: ClientConnection) -> None:
        while True:
            await socket.send(await self._outgoing.get())

    def _request(self, handle: int) -> None:
        wanted = self._wanted[handle]
        identity = next(self._identities)
        self._requests[identity] = handle, wanted.kind
        self._send(f"{wanted.kind}Subscribe", wanted.params, identity)

    def _end(self, kind: str, server_id: int) -> None:
        # A signature's subscription ends by itself with its one notification; to end it twice is harmless.
        self._send(f"{kind}Unsubscribe", [server_id], next(self._identities))

    def _send(self, method: str, params: list[Any], identity: int) -> None:
        text = json.dumps({"jsonrpc": "2.0", "id": identity, "method": method, "params": params})
        self._outgoing.put_nowait(text)

    def _read(self, message: str | bytes) -> None:
        """Raises ValueError, which ends the connection, for a message that is not JSON."""
        self.received += len(message) + _FRAME_BYTES
        try:
            received = json.loads(message)
        except RecursionError:
            raise ValueError("a message is nested too deeply") from None
        if not isinstance(received, dict):
            return
        identity = received.get("id")
        if isinstance(identity, int) and identity in self._requests:
            self._confirmed(*self._requests.pop(identity), received)
            return
        params = received.get("params")
        if not isinstance(params, dict):
            return
        server_id = params.get("subscription")
        handle = self._by_server_id.get(server_id) if isinstance(server_id, int) else None
        wanted = self._wanted.get(handle) if handle is not None else None
        if wanted is not None:
            wanted.push(params.get("result"))

    def _confirmed(self, handle: int, kind: str, received: dict[str, Json]) -> None:
        wanted = self._wanted.get(handle)
        server_id = received.get("result")
        if not isinstance(server_id, int):
            log.warning("%sSubscribe refused: %.200s; polling instead", kind, received.get("error"))
            return
        if wanted is None:
            # Given up before it stood. Endpoints bound the number of subscriptions of a connection.
            self._end(kind, server_id)
            return
        wanted.server_id = server_id
        self._by_server_id[server_id] = handle
        # What changed before the subscription stood was not pushed.
        wanted.push(None)
