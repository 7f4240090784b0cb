"""Snapshots of a running ledger: written bit by bit between requests, after which the log before them can go."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Final

from coordinator.ledger.bank import AdvanceSlot, Bank
from coordinator.ledger.journal import Journal, sync_folder
from coordinator.ledger.snapshot import encode
from coordinator.ledger.store import PART, Store

log = logging.getLogger(__name__)

# A restart replays at most about this many changes on top of a snapshot.
SNAPSHOT_EVERY: Final = 20_000


class Compactor:
    """Takes a snapshot at the start of a slot when enough changes have come since the last one.

    Args:
        last: number of changes in the newest snapshot.
        every: changes between snapshots.
        keep_log: the log is never removed, so that the whole chain can be replayed from its genesis.
    """

    def __init__(
        self, bank: Bank, journal: Journal, store: Store, last: int, *, every: int = SNAPSHOT_EVERY, keep_log: bool
    ) -> None:
        self._bank = bank
        self._journal = journal
        self._store = store
        self.last = last
        self._every = every
        self._keep_log = keep_log
        self._task: asyncio.Task[None] | None = None
        bank.on_slot.append(self._slot)

    def _slot(self, parent: int, slot: int) -> None:
        # Only here: a program deployed in a slot cannot be called before the next one, which a snapshot taken in the
        # middle would forget.
        if self._journal.index - self.last >= self._every and self._task is None:
            self._begin()

    def _begin(self) -> None:
        self.last = self._journal.index
        self._journal.rotate()
        self._task = asyncio.create_task(self._write(self.last, encode(self._bank.capture())))

    async def _write(self, index: int, content: Iterator[bytes]) -> None:
        path = self._store.snapshot_path(index)
        part = path.with_name(path.name + PART)
        try:
            with open(part, "wb", opener=_private) as file:
                for piece in content:
                    file.write(piece)
                    await asyncio.sleep(0)  # requests that came in the meantime
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            # A log without a gap: with --keep-log it is replayed from its start.
            await self._journal.durable()
            part.rename(path)
            await asyncio.to_thread(sync_folder, self._store.folder)
            await asyncio.to_thread(self._store.drop_old, keep_log=self._keep_log)
            log.info("snapshot after %d changes: %d bytes", index, path.stat().st_size)
        except OSError as error:
            # The log has everything; only a restart takes longer until the next snapshot succeeds.
            log.warning("no snapshot after %d changes: %s", index, error)
            part.unlink(missing_ok=True)
        finally:
            self._bank.end_capture()
            self._task = None

    async def idle(self) -> None:
        """Until no snapshot is being written."""
        if self._task is not None:
            await self._task

    async def finish(self) -> None:
        """The last snapshot of a ledger that ends: its next start has nothing to replay, whatever VM it has then."""
        await self.idle()
        if self._journal.failed or self._journal.index == self.last:
            return
        self._bank.apply(AdvanceSlot(self._bank.slot + 1, self._bank.unix_time))
        if self._task is None:
            self._begin()
        await self.idle()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
