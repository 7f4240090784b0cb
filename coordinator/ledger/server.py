"""A ledger with its endpoints and its clock, to run in a process of its own or inside a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.ledger.bank import Bank
from coordinator.ledger.clock import keep_time, unix_now
from coordinator.ledger.endpoint import Endpoint
from coordinator.ledger.faults import Faults
from coordinator.ledger.lagging import Lagging


@dataclass(frozen=True, slots=True)
class Address:
    """Where one endpoint is reached."""

    rpc: str
    ws: str


def _at_once(function: Callable[[], None]) -> None:
    function()


class LedgerServer:
    """Runs one ledger behind one endpoint or several.

    Args:
        slot_ms: length of a slot in milliseconds.
        endpoints: what goes wrong on each endpoint; one faultless endpoint if there are none. The clock's faults are
            those of the first.
    """

    def __init__(self, *, slot_ms: int = 50, endpoints: Sequence[Faults] = ()) -> None:
        self._slot_seconds = slot_ms / 1000
        self._faults = tuple(endpoints) or (Faults(),)
        genesis, unix_time = os.urandom(32), unix_now(self._faults[0])
        self.bank = Bank(genesis, unix_time)
        self._endpoints: list[Endpoint] = []
        for faults in self._faults:
            lagging = None
            if faults.stale:
                lagging = Lagging(self.bank, Bank(genesis, unix_time), faults.stale_slots).bank
            self._endpoints.append(Endpoint(self.bank, _at_once, faults, lagging))
        self._clock: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> list[Address]:
        """Listen on `port` and the one after it, two more for each further endpoint; 0: the system picks.

        Raises:
            OSError: cannot listen.
        """
        shown = f"[{host}]" if ":" in host else host
        addresses = []
        for index, endpoint in enumerate(self._endpoints):
            taken = await endpoint.start(host, port + 2 * index if port else 0)
            addresses.append(Address(f"http://{shown}:{taken}", f"ws://{shown}:{taken + 1}"))
        self._clock = asyncio.create_task(keep_time(self.bank, self._slot_seconds, self._faults[0]))
        return addresses

    async def wait(self, stopping: asyncio.Event) -> None:
        """Until `stopping` is set. Raises what ended the clock, if that ends first."""
        assert self._clock is not None, "start first"
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait((self._clock, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self._clock.done():
            await self._clock

    async def stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._clock
        for endpoint in self._endpoints:
            await endpoint.stop()
