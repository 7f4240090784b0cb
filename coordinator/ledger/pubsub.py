"""The WebSocket server: connections, and answers to the requests that come over them."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Final

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request

from coordinator.ledger.bank import Bank
from coordinator.ledger.descriptors import ACCEPTED_PER_TURN, Room, deepen_backlog
from coordinator.ledger.dispatch import parse_request
from coordinator.ledger.encoding import Json, UnsupportedEncoding
from coordinator.ledger.faults import Chance, Faults
from coordinator.ledger.http import reset
from coordinator.ledger.params import INTERNAL_ERROR, INVALID_PARAMS, PARSE_ERROR, RpcError
from coordinator.ledger.sockets import Client, Socket, WhenDurable
from coordinator.ledger.subscriptions import Subscription, Subscriptions

log = logging.getLogger(__name__)
# Failed handshakes are other people's mistakes (port scans, plain HTTP); their tracebacks are not news.
_quiet = logging.getLogger(f"{__name__}.handshake")
_quiet.setLevel(logging.CRITICAL)

MAX_MESSAGE_BYTES: Final = 64 * 1024
MAX_CONNECTIONS: Final = 1024


class PubSub:
    """The server for the subscriptions to one bank.

    Args:
        bank: whose changes are pushed.
        when_durable: calls a function once everything that the bank has executed is durable.
        faults: what goes wrong on the way.
        room: where its connections take their places.
    """

    def __init__(self, bank: Bank, when_durable: WhenDurable, faults: Faults, room: Room) -> None:
        self._connection = type("_Socket", (Socket,), {"room": room})
        self._when_durable = when_durable
        self._chance = Chance(faults, lambda: bank.slot)
        self._subscriptions = Subscriptions(bank, self._chance)
        self._clients: set[Client] = set()
        self._server: Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError when it cannot."""
        self._server = await serve(
            self._serve,
            host,
            port,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
            close_timeout=1,
            logger=_quiet,
            server_header=None,
            process_request=self._admit,
            create_connection=self._connection,
            backlog=ACCEPTED_PER_TURN,
        )
        deepen_backlog(self._server.sockets)

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close(close_connections=False)
        for client in tuple(self._clients):
            client.socket.transport.abort()

    async def _serve(self, socket: ServerConnection) -> None:
        if len(self._clients) >= MAX_CONNECTIONS:
            log.warning("refused a WebSocket: %d are open, which is the limit", MAX_CONNECTIONS)
            await socket.close(1013, "too many connections")
            return
        client = Client(socket, self._when_durable, self._chance)
        self._clients.add(client)
        writer = asyncio.create_task(self._write(client))
        life = self._chance.socket_life()
        cut = None if life is None else asyncio.get_running_loop().call_later(life, self._cut, client)
        try:
            async for message in socket:
                self._answer(client, message)
        except ConnectionClosed:
            pass
        finally:
            self._clients.discard(client)
            writer.cancel()
            if cut is not None:
                cut.cancel()
            self._subscriptions.leave(client)

    def _admit(self, socket: ServerConnection, request: Request) -> None:
        if self._chance.hits("refuse_sockets", self._chance.faults.refuse_sockets):
            reset(socket.transport)

    def _cut(self, client: Client) -> None:
        if self._chance.active():
            client.dropped = True
            reset(client.socket.transport)

    async def _write(self, client: Client) -> None:
        try:
            await client.write()
        except ConnectionClosed:
            return  # the reader sees it too and cleans up

    def _answer(self, client: Client, message: str | bytes) -> None:
        try:
            requests = json.loads(message)
        except (ValueError, RecursionError):
            error = {"code": PARSE_ERROR, "message": "Parse error"}
            client.push(json.dumps({"jsonrpc": "2.0", "error": error, "id": None}))
            return
        for request in requests if isinstance(requests, list) else [requests]:
            self._answer_one(client, request)

    def _answer_one(self, client: Client, request: Json) -> None:
        identity = request.get("id") if isinstance(request, dict) else None
        subscription: Subscription | None = None
        reply: dict[str, Json] = {"jsonrpc": "2.0"}
        try:
            name, params = parse_request(request)
            if name.endswith("Unsubscribe"):
                reply["result"] = self._subscriptions.unsubscribe(client, params)
            else:
                subscription = self._subscriptions.subscribe(client, name, params)
                reply["result"] = subscription.identity
        except RpcError as error:
            reply["error"] = error.to_json()
        except UnsupportedEncoding as error:
            reply["error"] = {"code": INVALID_PARAMS, "message": str(error)}
        except BaseException as error:  # as in dispatch: a panic of one request ends nothing else
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            log.exception("subscription failed: %.200r", request)
            reply["error"] = {"code": INTERNAL_ERROR, "message": "Internal error"}
        reply["id"] = identity
        client.push(json.dumps(reply))
        if subscription is not None:
            self._subscriptions.catch_up(subscription)
