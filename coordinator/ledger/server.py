"""A ledger with its endpoints and its clock, to run in a process of its own or inside a test."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.ledger.bank import Bank
from coordinator.ledger.clock import keep_time, unix_now
from coordinator.ledger.compaction import SNAPSHOT_EVERY, Compactor
from coordinator.ledger.descriptors import room_for_connections
from coordinator.ledger.endpoint import PORTS, Endpoint
from coordinator.ledger.faults import Faults
from coordinator.ledger.journal import Journal
from coordinator.ledger.lagging import Lagging
from coordinator.ledger.snapshot import decode, encode
from coordinator.ledger.store import Genesis, Store


@dataclass(frozen=True, slots=True)
class Address:
    """Where one endpoint is reached."""

    rpc: str
    ws: str


def _at_once(function: Callable[[], None]) -> None:
    function()


class LedgerServer:
    """Runs one ledger behind one endpoint or several. Made in a running event loop.

    Args:
        folder: where the ledger is kept; None: in memory only. What is there is read now.
        slot_ms: length of a slot in milliseconds.
        endpoints: what goes wrong on each endpoint; one faultless endpoint if there are none. The clock's faults are
            those of the first.
        snapshot_every: changes between snapshots.
        keep_log: never remove old parts of the log.

    Raises:
        StoreError: the folder cannot be used, or something in it is damaged.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        slot_ms: int = 50,
        endpoints: Sequence[Faults] = (),
        snapshot_every: int = SNAPSHOT_EVERY,
        keep_log: bool = False,
    ) -> None:
        self._slot_seconds = slot_ms / 1000
        self._faults = tuple(endpoints) or (Faults(),)
        unix_time = unix_now(self._faults[0])
        self._store = Store(folder, unix_time) if folder is not None else None
        self.genesis = Genesis(os.urandom(32), unix_time) if self._store is None else self._store.genesis
        self._journal: Journal | None = None
        self._compactor: Compactor | None = None
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._store is None:
            self.bank = self.genesis.bank()
        else:
            try:
                self._open(self._store, snapshot_every, keep_log)
            except BaseException:
                self._store.close()
                raise
        when_durable = _at_once if self._journal is None else self._journal.when_durable
        self._endpoints: list[Endpoint] = []
        room = room_for_connections(PORTS * len(self._faults))
        for faults in self._faults:
            lagging = None
            if faults.stale:
                lagging = Lagging(self.bank, self._twin(), faults.stale_slots).bank
            self._endpoints.append(Endpoint(self.bank, when_durable, faults, lagging, room))
        self._clock: asyncio.Task[None] | None = None

    def _open(self, store: Store, snapshot_every: int, keep_log: bool) -> None:
        opened = store.open()
        self.bank = opened.bank
        journal = Journal(store.folder, opened.log_first, opened.index, opened.log_size, self._failed.set_exception)
        self.bank.on_change.append(journal.append)
        self._journal = journal
        self._compactor = Compactor(self.bank, journal, store, opened.snapshot, every=snapshot_every, keep_log=keep_log)

    def _twin(self) -> Bank:
        twin = self.genesis.bank()
        twin.restore(decode(b"".join(encode(self.bank.capture()))))
        self.bank.end_capture()
        return twin

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
        """Until `stopping` is set. Raises what ended the ledger, if that comes first.

        Raises:
            OSError: the log cannot be written any more.
        """
        assert self._clock is not None, "start first"
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait((self._clock, self._failed, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for ended in (self._failed, self._clock):
            if ended.done():
                await ended

    async def stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._clock
        for endpoint in self._endpoints:
            await endpoint.stop()
        if self._store is None or self._journal is None or self._compactor is None:
            return
        await self._compactor.finish()
        await self._journal.close()
        self._store.close()
