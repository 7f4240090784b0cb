"""Solana's WebSocket subscriptions: account, program, logs, signature, slot, root.

Changes are pushed as each transaction executes. A client that does not read as fast as it is sent to is disconnected
when its queue is full; it never holds up the ledger or the other clients.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from solders.account import Account
from solders.pubkey import Pubkey
from solders.signature import Signature
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request

from coordinator.ledger.bank import SYSTEM_PROGRAM, Bank
from coordinator.ledger.descriptors import ACCEPTED_PER_TURN, Room, deepen_backlog
from coordinator.ledger.dispatch import COMMITMENTS, parse_request
from coordinator.ledger.encoding import Json, UnsupportedEncoding, account_json, keyed_account_json
from coordinator.ledger.faults import Chance, Faults
from coordinator.ledger.http import reset
from coordinator.ledger.params import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    RpcError,
    encoding_of,
    invalid,
    number,
    options_at,
    parse_filters,
    parse_pubkey,
    parse_signature,
    pubkey_at,
    text_at,
    window_of,
)
from coordinator.ledger.state import Record

log = logging.getLogger(__name__)
# Failed handshakes are other people's mistakes (port scans, plain HTTP); their tracebacks are not news.
_quiet = logging.getLogger(f"{__name__}.handshake")
_quiet.setLevel(logging.CRITICAL)

MAX_MESSAGE_BYTES: Final = 64 * 1024
MAX_CONNECTIONS: Final = 1024
MAX_SUBSCRIPTIONS: Final = 1024
MAX_QUEUED: Final = 2048
MAX_QUEUED_BYTES: Final = 16 * 2**20
_GONE: Final = Account(0, b"", SYSTEM_PROGRAM)


WhenDurable = Callable[[Callable[[], None]], None]


class _Socket(ServerConnection):
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


@dataclass(slots=True, eq=False)
class _Client:
    """One connection: what it subscribed to and what waits to be sent to it."""

    socket: ServerConnection
    queue: deque[tuple[float, str]] = field(default_factory=deque)
    unsent: int = 0
    unsent_bytes: int = 0
    subscriptions: dict[int, _Subscription] = field(default_factory=dict)
    dropped: bool = False
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def reserve(self, size: int) -> bool:
        """Room for a message of this many bytes, from when it is made until it is sent. False: the client is dropped.

        What waits for the disk counts too: it is all made before the first of it is queued.
        """
        if self.dropped:
            return False
        if self.unsent >= MAX_QUEUED or self.unsent_bytes + size > MAX_QUEUED_BYTES:
            log.warning("a WebSocket client is too slow: disconnected with %d messages unsent", self.unsent)
            self.dropped = True
            self.queue.clear()
            self.socket.transport.abort()
            return False
        self.unsent += 1
        self.unsent_bytes += size
        return True

    def push(self, text: str, due: float = 0.0) -> None:
        """Queue a message that has room; it is sent at `due` (the loop's time) or later, in order."""
        if not self.dropped:
            self.queue.append((due, text))
            self.waiting.set()

    async def write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self.queue:
                due, text = self.queue.popleft()
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                await self.socket.send(text)
                self.unsent -= 1
                self.unsent_bytes -= len(text)
            self.waiting.clear()
            await self.waiting.wait()


@dataclass(slots=True, eq=False)
class _Subscription:
    """`topic` is where it is filed: (kind, key); key is None where it takes everything of its kind."""

    identity: int
    client: _Client
    topic: tuple[str, Pubkey | Signature | None]
    encoding: str = "base64"
    window: tuple[int, int] | None = None
    filters: list[Callable[[Account], bool]] = field(default_factory=list)


class PubSub:
    """The subscriptions to one bank, and the WebSocket server that carries them.

    Args:
        bank: whose changes are pushed.
        when_durable: calls a function once everything that the bank has executed is durable.
        faults: what goes wrong on the way.
        room: where its connections take their places.
    """

    def __init__(self, bank: Bank, when_durable: WhenDurable, faults: Faults, room: Room) -> None:
        self._bank = bank
        self._connection = type("_Socket", (_Socket,), {"room": room})
        self._when_durable = when_durable
        self._chance = Chance(faults, lambda: bank.slot)
        self._topics: dict[tuple[str, Pubkey | Signature | None], dict[int, _Subscription]] = {}
        self._kinds: dict[str, int] = {}
        self._identities = itertools.count(1)
        self._clients: set[_Client] = set()
        self._server: Server | None = None
        bank.on_record.append(self._record)
        bank.on_slot.append(self._slot)

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

    # ------------------------------------------------------------------ connections

    async def _serve(self, socket: ServerConnection) -> None:
        if len(self._clients) >= MAX_CONNECTIONS:
            log.warning("refused a WebSocket: %d are open, which is the limit", MAX_CONNECTIONS)
            await socket.close(1013, "too many connections")
            return
        client = _Client(socket)
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
            for subscription in tuple(client.subscriptions.values()):
                self._remove(subscription)

    def _admit(self, socket: ServerConnection, request: Request) -> None:
        if self._chance.hits("refuse_sockets", self._chance.faults.refuse_sockets):
            reset(socket.transport)

    def _cut(self, client: _Client) -> None:
        if self._chance.active():
            client.dropped = True
            reset(client.socket.transport)

    async def _write(self, client: _Client) -> None:
        try:
            await client.write()
        except ConnectionClosed:
            return  # the reader sees it too and cleans up

    def _answer(self, client: _Client, message: str | bytes) -> None:
        try:
            requests = json.loads(message)
        except (ValueError, RecursionError):
            error = {"code": PARSE_ERROR, "message": "Parse error"}
            self._push(client, json.dumps({"jsonrpc": "2.0", "error": error, "id": None}))
            return
        for request in requests if isinstance(requests, list) else [requests]:
            self._answer_one(client, request)

    def _answer_one(self, client: _Client, request: Json) -> None:
        identity = request.get("id") if isinstance(request, dict) else None
        then: Callable[[], None] | None = None
        reply: dict[str, Json] = {"jsonrpc": "2.0"}
        try:
            name, params = parse_request(request)
            if name.endswith("Unsubscribe"):
                reply["result"] = self._unsubscribe(client, params)
            else:
                subscription = self._subscribe(client, name, params)
                reply["result"] = subscription.identity
                then = self._already_known(subscription)
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
        self._push(client, json.dumps(reply))
        if then is not None:
            then()

    # ------------------------------------------------------------------ subscriptions

    def _subscribe(self, client: _Client, name: str, params: list[Any]) -> _Subscription:
        if len(client.subscriptions) >= MAX_SUBSCRIPTIONS:
            raise RpcError(INVALID_REQUEST, f"at most {MAX_SUBSCRIPTIONS} subscriptions per connection")
        options = options_at(params, 1) if name != "logsSubscribe" else {}
        commitment = options.get("commitment")
        if commitment is not None and (not isinstance(commitment, str) or commitment not in COMMITMENTS):
            raise invalid(f"unknown commitment {str(commitment)[:64]!r}.")
        subscription = _Subscription(next(self._identities), client, self._topic(name, params))
        if name in ("accountSubscribe", "programSubscribe"):
            subscription.encoding = encoding_of(options, "binary")
            subscription.window = window_of(options)
            account_json(_GONE, subscription.encoding)  # an encoding that cannot be given is refused now
        if name == "programSubscribe":
            subscription.filters = parse_filters(options)
        self._topics.setdefault(subscription.topic, {})[subscription.identity] = subscription
        kind = subscription.topic[0]
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        client.subscriptions[subscription.identity] = subscription
        return subscription

    @staticmethod
    def _topic(name: str, params: list[Any]) -> tuple[str, Pubkey | Signature | None]:
        if name in ("accountSubscribe", "programSubscribe"):
            return name.removesuffix("Subscribe"), pubkey_at(params, 0)
        if name == "signatureSubscribe":
            return "signature", parse_signature(text_at(params, 0, "a signature"))
        if name in ("slotSubscribe", "rootSubscribe"):
            return name.removesuffix("Subscribe"), None
        if name == "logsSubscribe":
            wanted = params[0] if params else None
            if wanted in ("all", "allWithVotes"):
                return "logs", None
            mentions = wanted.get("mentions") if isinstance(wanted, dict) else None
            if not isinstance(mentions, list) or len(mentions) != 1:
                raise invalid('logsSubscribe takes "all" or {"mentions": [one address]}.')
            return "logs", parse_pubkey(mentions[0])
        raise RpcError(METHOD_NOT_FOUND, "Method not found")

    def _unsubscribe(self, client: _Client, params: list[Any]) -> bool:
        subscription = client.subscriptions.get(number(params[0] if params else None, "the subscription"))
        if subscription is None:
            raise invalid("Invalid subscription id.")
        self._remove(subscription)
        return True

    def _remove(self, subscription: _Subscription) -> None:
        topic = self._topics.get(subscription.topic)
        if topic is None or topic.pop(subscription.identity, None) is None:
            return
        if not topic:
            del self._topics[subscription.topic]
        self._kinds[subscription.topic[0]] -= 1
        subscription.client.subscriptions.pop(subscription.identity, None)

    def _already_known(self, subscription: _Subscription) -> Callable[[], None] | None:
        """A signature that landed before it was subscribed to is pushed at once."""
        kind, key = subscription.topic
        if kind != "signature" or not isinstance(key, Signature):
            return None
        record = self._bank.record(key)
        return None if record is None else lambda: self._signature(record)

    # ------------------------------------------------------------------ notifications

    def _push(self, client: _Client, text: str) -> None:
        """What a client learns is durable first. The delay is one way of the two that a request takes."""
        if not client.reserve(len(text)):
            return

        def push() -> None:
            delay = self._chance.half_delay("push")
            client.push(text, asyncio.get_running_loop().time() + delay if delay else 0.0)

        self._when_durable(push)

    def _send(self, kind: str, subscription: _Subscription, result: str) -> None:
        if self._chance.hits("mute", self._chance.faults.mute) or subscription.client.dropped:
            return
        self._push(
            subscription.client,
            f'{{"jsonrpc":"2.0","method":"{kind}Notification","params":'
            f'{{"result":{result},"subscription":{subscription.identity}}}}}',
        )

    def _value(self, value: Json) -> str:
        return json.dumps({"context": {"slot": self._bank.slot}, "value": value}, separators=(",", ":"))

    def _slot(self, parent: int, slot: int) -> None:
        if self._kinds.get("slot"):
            # One bank, so no fork: a frozen slot is rooted.
            result = json.dumps({"parent": parent, "root": parent, "slot": slot})
            for subscription in tuple(self._topics[("slot", None)].values()):
                self._send("slot", subscription, result)
        if self._kinds.get("root"):
            for subscription in tuple(self._topics[("root", None)].values()):
                self._send("root", subscription, str(parent))

    def _record(self, record: Record) -> None:
        if self._kinds.get("signature"):
            self._signature(record)
        if self._kinds.get("logs"):
            self._logs(record)
        if self._kinds.get("account") or self._kinds.get("program"):
            for key in record.writable:
                self._account(key)

    def _signature(self, record: Record) -> None:
        waiting = self._topics.get(("signature", record.signature))
        if waiting is None:
            return
        result = self._value({"err": record.error})
        for subscription in tuple(waiting.values()):
            self._send("signature", subscription, result)
            self._remove(subscription)

    def _logs(self, record: Record) -> None:
        wanted = [self._topics.get(("logs", key)) for key in (None, *record.keys)]
        if not any(wanted):
            return
        value = {"signature": str(record.signature), "err": record.error, "logs": record.meta.logs()}
        result = self._value(value)
        for subscriptions in wanted:
            for subscription in tuple((subscriptions or {}).values()):
                self._send("logs", subscription, result)

    def _account(self, key: Pubkey) -> None:
        watchers = self._topics.get(("account", key))
        if watchers is None and not self._kinds.get("program"):
            return
        account = self._bank.account(key) or _GONE
        owners = self._topics.get(("program", account.owner)) if self._kinds.get("program") else None
        # Watchers of one account mostly ask for the same form of it: encode each form once, and hold one at a time.
        forms: dict[tuple[str, tuple[int, int] | None], list[_Subscription]] = {}
        for subscription in (*(watchers or {}).values(), *(owners or {}).values()):
            if all(test(account) for test in subscription.filters):
                forms.setdefault((subscription.encoding, subscription.window), []).append(subscription)
        for (encoding, window), subscriptions in forms.items():
            self._send_account(key, account, encoding, window, subscriptions)

    def _send_account(
        self,
        key: Pubkey,
        account: Account,
        encoding: str,
        window: tuple[int, int] | None,
        subscriptions: list[_Subscription],
    ) -> None:
        wanted = [subscription for subscription in subscriptions if not subscription.client.dropped]
        if not wanted:
            return
        try:
            shape = account_json(account, encoding, window)
        except UnsupportedEncoding:
            # base58 of an account that is now too long for it: base64 says so itself.
            shape = account_json(account, "base64", window)
        for kind, value in (("account", shape), ("program", keyed_account_json(key, shape))):
            alike = [subscription for subscription in wanted if subscription.topic[0] == kind]
            if alike:
                result = self._value(value)
                for subscription in alike:
                    self._send(kind, subscription, result)
