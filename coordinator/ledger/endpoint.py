"""One endpoint of a ledger: its HTTP and WebSocket ports, and what goes wrong on them.

Without faults a request is executed at once, and its answer leaves when everything it can rest on is durable.
"""

from __future__ import annotations

import asyncio
import json
import socket
from functools import partial
from typing import Final

from solders.transaction_metadata import FailedTransactionMetadata

# Imported for their effect: they register the methods.
from coordinator.ledger import blocks as _blocks  # noqa: F401
from coordinator.ledger import methods as _methods  # noqa: F401
from coordinator.ledger import tokens as _tokens  # noqa: F401
from coordinator.ledger import transactions as _transactions  # noqa: F401
from coordinator.ledger.bank import Bank
from coordinator.ledger.descriptors import Room, room_for_connections
from coordinator.ledger.dispatch import Rpc
from coordinator.ledger.faults import Chance, Faults
from coordinator.ledger.http import HttpServer
from coordinator.ledger.pubsub import PubSub
from coordinator.ledger.reply import RESET, Deliver, Reply
from coordinator.ledger.sanitize import Checked
from coordinator.ledger.sockets import WhenDurable

PORTS: Final = 2
_PORT_ATTEMPTS: Final = 32


class Endpoint:
    """Serves a bank on two neighbouring ports.

    Args:
        bank: the ledger's state.
        when_durable: calls a function once everything that the bank has executed is durable.
        faults: what goes wrong.
        lagging: the bank that stale answers come from; needed where `faults.stale` is not 0.
        room: where connections take their places; its own if there is none, for an endpoint that is alone.
    """

    def __init__(
        self,
        bank: Bank,
        when_durable: WhenDurable,
        faults: Faults | None = None,
        lagging: Bank | None = None,
        room: Room | None = None,
    ) -> None:
        faults = faults or Faults()
        room = room or room_for_connections(PORTS)
        self._rpc = _FaultyRpc(bank, faults) if faults.lose else Rpc(bank)
        self._when_durable = when_durable
        if faults.stale and lagging is None:
            raise ValueError("stale answers need a lagging bank")
        self._stale = Rpc(lagging, bank) if lagging is not None else None
        self._chance = Chance(faults, lambda: bank.slot)
        self._http = HttpServer(self._answer_with_faults if faults.any_http else self._answer, room)
        self._pubsub = PubSub(bank, when_durable, faults, room)

    # ------------------------------------------------------------------ ports

    async def start(self, host: str, port: int) -> int:
        """Take `port` and the one after it, or any two neighbours for 0. Returns the first; raises OSError."""
        if port:
            await self._http.start(host, port)
            await self._pubsub.start(host, port + 1)
            return port
        # A name with several addresses would get another free port on each: take the first address.
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        address = str(found[0][4][0])
        for attempt in range(_PORT_ATTEMPTS):
            picked = await self._http.start(address, 0)
            try:
                await self._pubsub.start(address, picked + 1)
            except (OSError, OverflowError):
                await self._http.stop()
                if attempt == _PORT_ATTEMPTS - 1:
                    raise
            else:
                return picked
        raise AssertionError("unreachable")

    async def stop(self) -> None:
        await self._http.stop()
        await self._pubsub.stop()

    # ------------------------------------------------------------------ requests

    def _answer(self, body: bytes, deliver: Deliver) -> None:
        reply = Reply(self._rpc.answer(body))
        self._when_durable(partial(deliver, reply))

    def _answer_with_faults(self, body: bytes, deliver: Deliver) -> None:
        chance, faults = self._chance, self._chance.faults
        names = _method_names(body)
        if faults.methods and names.isdisjoint(faults.methods):
            self._answer(body, deliver)
            return
        there, back = chance.half_delay("there"), chance.half_delay("back")
        loop = asyncio.get_running_loop()

        def answer(reply: Reply) -> None:
            if back:
                loop.call_later(back, deliver, reply)
            else:
                deliver(reply)

        if chance.hits("reset", faults.reset):
            then = partial(answer, RESET)
        elif chance.hits("too_many", faults.too_many) or chance.over_rate(loop.time()):
            then = partial(answer, Reply(b"Too many requests", 429, faults.retry_after_s))
        elif chance.hits("unavailable", faults.unavailable):
            then = partial(answer, Reply(b"Service unavailable", 503))
        else:
            then = partial(self._execute, body, "sendTransaction" in names, answer)
        if there:
            loop.call_later(there, then)
        else:
            then()

    def _execute(self, body: bytes, sends: bool, answer: Deliver) -> None:
        chance, faults = self._chance, self._chance.faults
        rpc = self._rpc
        if self._stale is not None and chance.hits("stale", faults.stale):
            rpc = self._stale
        reply = Reply(rpc.answer(body))
        if sends and chance.hits("duplicate", faults.duplicate):
            reply = Reply(rpc.answer(body))
        if chance.hits("reset_after", faults.reset_after):
            reply = RESET
        self._when_durable(partial(answer, reply))


class _FaultyRpc(Rpc):
    """Loses transactions after it has accepted them."""

    def __init__(self, bank: Bank, faults: Faults) -> None:
        super().__init__(bank)
        self._chance = Chance(faults, lambda: bank.slot)

    def submit(self, checked: Checked, *, preflight: bool) -> FailedTransactionMetadata | None:
        if self._chance.hits("lose", self._chance.faults.lose):
            return self.preflight(checked) if preflight else None
        return super().submit(checked, preflight=preflight)


def _method_names(body: bytes) -> set[str]:
    """The methods that a body asks for; what is malformed has none."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return set()
    found = [
        one.get("method") for one in (request if isinstance(request, list) else [request]) if isinstance(one, dict)
    ]
    return {name for name in found if isinstance(name, str)}
