"""Where a download gets its pieces: a bulk connection if there is one, else gRPC, and never a wait for the former.

A connection is made in the background while pieces come by gRPC, and given to the next run of pieces. What a connection
that broke did not bring comes by gRPC. So a bulk port behind a firewall costs a few packets now and then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol

from psyche_node.identity import node_id
from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.bulk.client import BulkConnection, Run, WrongNode
from psyche_node.network.bulk.secure import Broken, Contexts, client_context
from psyche_node.network.certificates import BadCertificate, ExpiredCertificate, Leaf
from psyche_node.network.directory import Directory
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.messages import Why
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.statements import NodeRecord
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
# For less, gRPC's connection, which is there anyway, costs less than another handshake.
WORTH_BYTES = 4 * PIECE_BYTES
MAX_PER_PEER = 4
MAX_OPENING = 8
MAX_IDLE = 32
MAX_IDLE_PER_PEER = 2
# Shorter than the server keeps one.
IDLE_SECONDS = 100.0
RETRY_SECONDS = 30.0
LONGEST_RETRY_SECONDS = 1800.0
Basis = tuple[str, bytes, Leaf]


class Pieces(Protocol):
    """Pieces on their way. ``cancel`` may be called from any thread."""

    def __iter__(self) -> Iterator[bytes | memoryview]:
        """Yield pieces as they come; each may be overwritten by the next. Raises CallFailed."""

    def cancel(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Failed:
    """Connecting by these words of a record failed; it is not tried before ``due``."""

    basis: Basis
    seconds: float
    due: float


class Lanes:
    """The bulk connections of this node to others. Any thread."""

    def __init__(
        self,
        links: Links,
        leaf: Callable[[], Leaf],
        directory: Directory,
        reporter: Reporter,
        traffic: Traffic,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.links, self.traffic = links, traffic
        self._leaf, self._directory, self._reporter, self._clock = leaf, directory, reporter, clock
        self._lock = threading.Lock()
        self._idle: dict[bytes, list[tuple[Basis, BulkConnection]]] = {}
        self._busy: dict[bytes, int] = {}
        self._opening: set[bytes] = set()
        self._failed: dict[bytes, _Failed] = {}
        self._contexts = Contexts(leaf, client_context)
        self._closed = False

    def lane(self, peer: bytes, length: int) -> Lane:
        """Return the way to ``peer`` for a blob of ``length`` bytes; the caller closes it."""
        return Lane(self, peer, worth=length >= WORTH_BYTES)

    def prepare(self, peer: bytes, length: int) -> None:
        """Have a connection ready for a blob that will be fetched from ``peer``, if it is long enough."""
        with self._lock:
            basis = self._basis(peer)
            there = bool(self._idle.get(peer))
        if basis is not None and not there and length >= WORTH_BYTES:
            self._open(peer, basis)

    def coming(self, peer: bytes) -> bool:
        """Return whether a connection is being made just now."""
        return peer in self._opening

    def take(self, peer: bytes, *, worth: bool) -> tuple[Basis, BulkConnection] | None:
        """Return a connection, for one thread until it gives it back; or None, and, if it is ``worth`` it, make one."""
        while True:
            with self._lock:
                basis = self._basis(peer)
                stale = self._stale(peer, basis)
                found = self._idle[peer].pop() if self._idle.get(peer) else None
                if found is not None:
                    self._busy[peer] = self._busy.get(peer, 0) + 1
            for connection in stale:
                connection.close()
            if found is None:
                if basis is not None and worth:
                    self._open(peer, basis)
                return None
            if found[1].wake():
                return found
            # The server closed it, as it may: that is no failure.
            self._drop(peer, found[1])

    def give(self, peer: bytes, basis: Basis, connection: BulkConnection) -> None:
        """Give a connection back."""
        if not connection.reusable:
            self._drop(peer, connection)
            return
        connection.rest()
        with self._lock:
            idle = self._idle.get(peer, [])
            kept = (
                basis == self._basis(peer)
                and len(idle) < MAX_IDLE_PER_PEER
                and sum(map(len, self._idle.values())) < MAX_IDLE
            )
            if kept:
                self._idle.setdefault(peer, []).append((basis, connection))
                self._release(peer)
        if not kept:
            self._drop(peer, connection)

    def broke(self, peer: bytes, basis: Basis, reason: str) -> None:
        """A connection failed while it was used, or was not made: another one is not tried for a while."""
        with self._lock:
            before = self._failed.get(peer)
            again = before is not None and before.basis == basis
            seconds = min(2 * before.seconds, LONGEST_RETRY_SECONDS) if before is not None and again else RETRY_SECONDS
            self._failed[peer] = _Failed(basis, seconds, self._clock() + seconds)
        log.debug("no bulk connection to %s for %.0f s: %s", node_id(peer), seconds, reason)

    def worked(self, peer: bytes) -> None:
        """A connection brought what it was asked for."""
        if peer in self._failed:
            with self._lock:
                self._failed.pop(peer, None)

    def retain(self, peers: Container[bytes]) -> None:
        """Close the idle connections to all other nodes."""
        with self._lock:
            gone = [one for peer in list(self._idle) if peer not in peers for _, one in self._idle.pop(peer)]
            self._failed = {peer: failed for peer, failed in self._failed.items() if peer in peers}
        for connection in gone:
            connection.close()

    def close(self) -> None:
        self._closed = True
        self.retain(())

    def _basis(self, peer: bytes) -> Basis | None:
        """Return what a connection is made by, None if there is to be none."""
        record = self._directory.record(peer)
        if self._closed or record is None or not record.bulk_address or record.is_private:
            return None
        return None if self._directory.slot(peer) is None else (record.bulk_address, record.tls_leaf, self._leaf())

    def _stale(self, peer: bytes, basis: Basis | None) -> list[BulkConnection]:
        oldest = time.monotonic() - IDLE_SECONDS
        stale = []
        for key, idle in list(self._idle.items()):
            kept = [entry for entry in idle if entry[1].idle_since > oldest and (key != peer or entry[0] == basis)]
            stale += [entry[1] for entry in idle if entry not in kept]
            if kept:
                self._idle[key] = kept
            else:
                del self._idle[key]
        return stale

    def _open(self, peer: bytes, basis: Basis) -> None:
        with self._lock:
            failed = self._failed.get(peer)
            if failed is not None and failed.basis == basis and self._clock() < failed.due:
                return
            if peer in self._opening or len(self._opening) >= MAX_OPENING or self._busy.get(peer, 0) >= MAX_PER_PEER:
                return
            record = self._directory.record(peer)
            if record is None:
                return
            self._opening.add(peer)
            self._busy[peer] = self._busy.get(peer, 0) + 1
        threading.Thread(target=self._make, args=(peer, basis, record), name="bulk-open", daemon=True).start()

    def _make(self, peer: bytes, basis: Basis, record: NodeRecord) -> None:
        try:
            connection = BulkConnection(record, self._contexts.current())
        except (OSError, Broken, BadCertificate, WrongNode) as error:
            if isinstance(error, BadCertificate | WrongNode):
                why = Why.EXPIRED if isinstance(error, ExpiredCertificate) else Why.IDENTITY
                self._reporter.rejected("certificate", peer, f"at {record.bulk_address}: {error}", why)
            with self._lock:
                self._opening.discard(peer)
                self._release(peer)
            self.broke(peer, basis, str(error))
            return
        with self._lock:
            self._opening.discard(peer)
        self.give(peer, basis, connection)

    def _drop(self, peer: bytes, connection: BulkConnection) -> None:
        connection.close()
        with self._lock:
            self._release(peer)

    def _release(self, peer: bytes) -> None:
        self._busy[peer] -= 1
        if not self._busy[peer]:
            del self._busy[peer]


class Lane:
    """One download's way to a peer. For one thread; the pieces that ``fetch`` returns are read in order."""

    def __init__(self, lanes: Lanes, peer: bytes, *, worth: bool) -> None:
        self._lanes, self._peer, self._worth = lanes, peer, worth
        self._held: tuple[Basis, BulkConnection] | None = None

    @property
    def soon(self) -> bool:
        """Whether a connection is being made: what is fetched now comes by gRPC, so it should be little."""
        return self._held is None and self._worth and self._lanes.coming(self._peer)

    def fetch(self, digest: bytes, first: int, count: int, timeout: float, kind: wire.Kind.ValueType) -> Pieces:
        """Start to fetch pieces, as ``Links.fetch`` does. Raises CallFailed."""
        if self._held is not None and self._held[1].ended:
            self.close()
        if self._held is None:
            self._held = self._lanes.take(self._peer, worth=self._worth)
        if self._held is not None:
            basis, connection = self._held
            raw = wire.FetchRequest(digest=digest, first=first, count=count, kind=kind).SerializeToString()
            try:
                run = connection.ask(raw, count, timeout)
            except Broken as error:
                self._failed(basis, connection, error)
            else:
                self._lanes.traffic.sent(self._peer, len(raw))
                return _BulkPieces(self, basis, run, (digest, first, count, timeout, kind))
        return self._lanes.links.fetch(self._peer, digest, first, count, timeout, kind)

    def close(self) -> None:
        """Give back what it uses."""
        if self._held is not None:
            (basis, connection), self._held = self._held, None
            self._lanes.give(self._peer, basis, connection)

    def _failed(self, basis: Basis, connection: BulkConnection, error: Broken) -> None:
        if not connection.dropped:
            self._lanes.broke(self._peer, basis, str(error))
        if self._held is not None and self._held[1] is connection:
            self.close()


class _BulkPieces:
    """A run over a bulk connection; what that does not bring comes by gRPC."""

    def __init__(
        self, lane: Lane, basis: Basis, run: Run, asked: tuple[bytes, int, int, float, wire.Kind.ValueType]
    ) -> None:
        self._lane, self._basis, self._run, self._asked = lane, basis, run, asked
        self._until = time.monotonic() + asked[3]
        self._other: Pieces | None = None
        self._lock = threading.Lock()
        self._cancelled = False

    def __iter__(self) -> Iterator[bytes | memoryview]:
        lane, arrived = self._lane, 0
        digest, first, count, _, kind = self._asked
        try:
            for piece in self._run:
                lane._lanes.traffic.received(lane._peer, len(piece), blob=True, bulk=True)
                arrived += 1
                yield piece
            lane._lanes.worked(lane._peer)
            return
        except Broken as error:
            if self._cancelled:
                raise CallFailed(Cause.SLOW, "nothing came for too long") from None
            lane._failed(self._basis, self._run.connection, error)
        if arrived >= count:
            return
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise CallFailed(Cause.SLOW, "it did not bring what it was asked for in time")
        other = lane._lanes.links.fetch(lane._peer, digest, first + arrived, count - arrived, seconds, kind)
        with self._lock:
            self._other = other
            if self._cancelled:
                other.cancel()
        yield from other

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            other = self._other
        if other is None and not self._run.complete and self._run.connection.stalled:
            self._lane._lanes.broke(self._lane._peer, self._basis, "nothing came for too long")
        self._run.cancel()
        if other is not None:
            other.cancel()
