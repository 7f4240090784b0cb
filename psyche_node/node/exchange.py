"""The updates of the rounds in flight: what is committed, what has arrived, what has been validated.

A blob becomes usable here and nowhere else: its digest is the committed one (the network checks every piece), its
length is the layout's, it decodes in the one canonical way, and it names this run, round and member.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path

from coordinator.state import Commitment
from optimizer.codec import Header, validate
from optimizer.errors import MalformedUpdate
from optimizer.layout import Layout
from psyche_node.ipc import Caller, Message, Ok
from psyche_node.mapping import mapped
from psyche_node.network.messages import (
    Fetched,
    FetchFailed,
    Forget,
    NetworkRestarted,
    PeerDown,
    PeerUp,
    Publish,
    Rejected,
    Want,
    WantEntry,
)
from psyche_node.network.store import BlobStore
from psyche_node.node.changes import Changes
from psyche_node.node.journal import Journal

log = logging.getLogger(__name__)
ALONE_SECONDS = 3600.0


@dataclass(slots=True)
class _Entry:
    commitment: Commitment
    valid: bool = False
    refusal: str | None = None

    @property
    def settled(self) -> bool:
        return self.valid or self.refusal is not None


class UpdateMissing(Exception):
    """An update that counts could not be had from any peer in time, or is none."""


class UpdateExchange:
    """Follows the commitments of each round until the updates behind them are validated or refused."""

    def __init__(self, network: Caller, store: BlobStore, layout: Layout, run: bytes, journal: Journal) -> None:
        self._network, self._store, self._layout, self._run, self._journal = network, store, layout, run, journal
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connected: set[int] = set()
        self._alone = False
        self.changes = Changes()

    def on_event(self, message: Message) -> None:
        """Take an event of the network process."""
        if isinstance(message, Fetched):
            self._spawn(self._validate(message.round, message.member))
        elif isinstance(message, FetchFailed) and message.final:
            key = (message.round, message.member)
            entry = self._entries.get(key)
            if entry is not None and not entry.settled and entry.commitment.digest.hex() == message.digest:
                self._refuse(key, entry, message.reason)
        elif isinstance(message, FetchFailed):
            log.info(
                "update of member %d, round %d: %s; looking further", message.member, message.round, message.reason
            )
        elif isinstance(message, PeerUp | PeerDown):
            self._follow_connections(message)
        elif isinstance(message, Rejected):
            self._journal.write(
                "rejected", what=message.what, peer=message.peer, member=message.member, reason=message.reason
            )
        elif isinstance(message, NetworkRestarted):
            self._journal.write("network restarted", restarts=message.restarts, reason=message.reason)

    def _follow_connections(self, message: PeerUp | PeerDown) -> None:
        if isinstance(message, PeerUp):
            self._connected.add(message.slot)
        else:
            self._connected.discard(message.slot)
        # A node that has never had a connection is not waiting for them to come back.
        alone = isinstance(message, PeerDown) and not self._connected
        if alone != self._alone:
            log.warning(
                "no other member is connected any more; waiting for the network to come back"
                if alone
                else "connected to another member again"
            )
            self._alone = alone
            self.changes.fire()

    async def follow(self, round_number: int, commitments: Iterable[Commitment]) -> None:
        """Want every committed update of the round that is not here yet."""
        wants: list[WantEntry] = []
        for commitment in commitments:
            key = (round_number, commitment.member)
            if key in self._entries:
                continue
            self._entries[key] = entry = _Entry(commitment)
            if commitment.length != self._layout.update_bytes:
                self._refuse(
                    key,
                    entry,
                    f"wrong length: {commitment.length} bytes committed, the layout says {self._layout.update_bytes}",
                )
            elif self._store.path(commitment.digest) is not None:
                self._spawn(self._validate(*key))
            else:
                wants.append(
                    WantEntry(member=commitment.member, digest=commitment.digest.hex(), length=commitment.length)
                )
        if wants:
            await self._network.call(Want(round=round_number, wants=wants), Ok)

    async def publish(self, round_number: int, member: int, digest: bytes, length: int) -> None:
        """Announce my own update, committed on chain, whose blob is in the store."""
        await self._network.call(Publish(round=round_number, member=member, digest=digest.hex(), length=length), Ok)

    def followed(self, round_number: int) -> frozenset[int]:
        """Return the members whose commitment of the round is known here."""
        return frozenset(m for r, m in self._entries if r == round_number)

    def held(self, round_number: int) -> frozenset[int]:
        """Return the members whose update of the round is here and valid."""
        return frozenset(m for (r, m), entry in self._entries.items() if r == round_number and entry.valid)

    def settled(self, round_number: int, committed: Iterable[int]) -> bool:
        """Return whether every one of these updates has been validated or refused for good."""
        entries = [self._entries.get((round_number, member)) for member in committed]
        return all(entry is not None and entry.settled for entry in entries)

    async def obtain(self, round_number: int, members: Iterable[int], timeout: float) -> list[Path]:
        """Return the files of these members' updates, in member order, waiting for those that are still on their way.

        Raises UpdateMissing after ``timeout`` seconds, or at once for an update that was refused. Time in which this
        node has lost the connections to all others does not count, an hour of it at most.
        """
        wanted = sorted(members)
        patience = {False: timeout, True: ALONE_SECONDS}
        loop = asyncio.get_running_loop()
        try:
            while not self.held(round_number).issuperset(wanted):
                self._check_refusals(round_number, wanted)
                alone, since = self._alone, loop.time()
                async with asyncio.timeout(patience[alone]):
                    await self.changes.beyond(self.changes.version)
                patience[alone] -= loop.time() - since
        except TimeoutError:
            missing = [member for member in wanted if member not in self.held(round_number)]
            raise UpdateMissing(
                f"round {round_number}: no peer served the update of member(s) {missing} within {timeout:.0f} s, and "
                "it counts. Check the links to the other nodes (addresses are in the log), then start this node again"
            ) from None
        paths = []
        for member in wanted:
            path = self._store.path(self._entries[round_number, member].commitment.digest)
            if path is None:
                raise UpdateMissing(f"round {round_number}: the validated update of member {member} left the store")
            paths.append(path)
        return paths

    async def forget(self, before_round: int) -> None:
        """Drop everything about rounds before ``before_round``."""
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] >= before_round}
        await self._network.call(Forget(before_round=before_round), Ok)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check_refusals(self, round_number: int, wanted: list[int]) -> None:
        for member in wanted:
            entry = self._entries.get((round_number, member))
            if entry is not None and entry.refusal is not None:
                raise UpdateMissing(
                    f"round {round_number}: the update of member {member} counts, and this node refused it: "
                    f"{entry.refusal}. Is this node's version that of the others?"
                )

    async def _validate(self, round_number: int, member: int) -> None:
        key = (round_number, member)
        entry = self._entries.get(key)
        if entry is None or entry.settled:
            return
        path = self._store.path(entry.commitment.digest)
        if path is None:
            return
        refusal: str | None = None
        try:
            found = await asyncio.to_thread(lambda: validate(mapped(path), self._layout))
        except MalformedUpdate as error:
            refusal = str(error)
        except OSError as error:
            log.warning("update of member %d, round %d: cannot be read: %s", member, round_number, error)
            return
        else:
            if found != Header(self._run, round_number, member):
                refusal = f"it says run {found.run.hex()[:8]}, round {found.round}, member {found.member}"
        if entry.settled or self._entries.get(key) is not entry:
            return  # by another event for the same update, or forgotten meanwhile
        if refusal is not None:
            self._refuse(key, entry, refusal)
            return
        entry.valid = True
        self.changes.fire()

    def _refuse(self, key: tuple[int, int], entry: _Entry, reason: str) -> None:
        entry.refusal = reason
        log.warning("rejected the update of member %d in round %d: %s", key[1], key[0], reason)
        self._journal.write("rejected", what="update", peer="", member=key[1], round=key[0], reason=reason)
        self.changes.fire()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
