"""One bulk connection to another node, from this side: runs of pieces that are asked for, and read in that order."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.bulk import frames
from psyche_node.network.bulk.secure import Broken, Secure
from psyche_node.network.links import CallFailed, Cause
from psyche_node.network.sending import Status
from psyche_node.network.statements import NodeRecord, split_address

CONNECT_SECONDS = 3.0
HANDSHAKE_SECONDS = 10.0
# Longer than a source may be silent before it is given up (``fetcher``).
SILENCE_SECONDS = 30.0
STALLED_SECONDS = 5.0
# For the end of a run, when its last piece has been here for a while.
SETTLE_SECONDS = 0.5
_CAUSES: dict[int, Cause] = {
    Status.INVALID: Cause.BROKEN,
    Status.NOT_FOUND: Cause.MISSING,
    Status.DENIED: Cause.REFUSED,
    Status.EXHAUSTED: Cause.BUSY,
}


class WrongNode(Exception):
    """Who answers at a bulk address is not whose record names it; the message says who is."""


class Run:
    """Pieces that were asked for. Iterate it once; a piece is there until the next one comes."""

    def __init__(self, connection: BulkConnection, count: int, until: float) -> None:
        self.connection = connection
        self._count, self._until = count, until
        self._arrived = 0
        self.over = False

    def __iter__(self) -> Iterator[memoryview]:
        """Raises CallFailed for what the other side says, and Broken when the connection is lost."""
        self.connection.come_to(self)
        while (frame := self._next()) is not None:
            yield frame

    @property
    def complete(self) -> bool:
        """Whether all of its pieces are here; then only its end may still come."""
        return self.over or self._arrived >= self._count

    def settle(self) -> None:
        """Read its end, when nobody wanted more of it. Raises Broken when there is more than that."""
        with contextlib.suppress(CallFailed):
            if not self.over and (not self.complete or self._next() is not None):
                self.connection.drop()
                raise Broken("what was asked for is not wanted any more")

    def cancel(self) -> None:
        """Nobody wants more of it. Any thread."""
        if not self.complete:
            # There is no way to tell the other side but this.
            self.connection.drop()

    def _next(self) -> memoryview | None:
        if time.monotonic() > self._until:
            self.connection.drop()
            raise CallFailed(Cause.SLOW, "it did not bring what it was asked for in time")
        frame = self.connection.read()
        if isinstance(frame, memoryview):
            self._arrived += 1
            return frame
        self.over = True
        if frame.status != Status.OK:
            cause = _CAUSES.get(frame.status, Cause.BROKEN)
            raise CallFailed(cause, f"{cause}: {frame.reason[:200]}")
        return None


class BulkConnection:
    """A connection to the holder of a node record's key and certificate. One thread at a time."""

    def __init__(self, record: NodeRecord, context: ssl.SSLContext) -> None:
        """Connect. Raises OSError, ssl.SSLError, Broken, BadCertificate or WrongNode."""
        sock = socket.create_connection(split_address(record.bulk_address), timeout=CONNECT_SECONDS)
        self._secure = Secure(sock, context, server_side=False)
        try:
            self._secure.handshake(HANDSHAKE_SECONDS)
            certificate = self._secure.certificate()
            if certificate.node_key != record.node_key:
                raise WrongNode("another node answers there")
            if certificate.der_hash != record.tls_leaf:
                raise WrongNode("the certificate there is not the one in the node's record")
            self._secure.patience(SILENCE_SECONDS)
        except BaseException:
            self._secure.close()
            raise
        self._asked: deque[Run] = deque()
        self._piece: memoryview | None = None
        self.dropped = False
        self.idle_since = self._moved = time.monotonic()

    def ask(self, request: bytes, count: int, seconds: float) -> Run:
        """Ask for ``count`` pieces by a serialized FetchRequest. Raises Broken."""
        if not self._asked:
            self._moved = time.monotonic()
        run = Run(self, count, time.monotonic() + seconds)
        self._secure.send(frames.request_frame(request))
        self._asked.append(run)
        return run

    def come_to(self, run: Run) -> None:
        """Have what was asked for before ``run`` behind. Raises Broken."""
        while self._asked and self._asked[0] is not run:
            self._asked[0].settle()
            self._asked.popleft()
        if not self._asked:
            raise Broken("it was read already")

    def read(self) -> memoryview | frames.End:
        """Return the next frame. Raises Broken."""
        if self._secure.ended:
            raise Broken("it was ended")
        if self._piece is None:
            self._piece = memoryview(bytearray(PIECE_BYTES))
        try:
            frame = frames.read_frame(self._secure, self._piece)
            self._moved = time.monotonic()
            return frame
        except frames.BadFrame as error:
            raise Broken(f"it does not keep to the protocol: {error}") from None

    @property
    def reusable(self) -> bool:
        """Whether others may go on with it: nothing is coming that nobody wants."""
        return not self._secure.ended and all(run.complete for run in self._asked)

    def rest(self) -> None:
        """Free its buffers; it is not used for a while."""
        self._piece = None
        self._secure.rest()
        self.idle_since = time.monotonic()

    def wake(self) -> bool:
        """Return whether it is good for another request."""
        try:
            self._secure.patience(SETTLE_SECONDS)
            while self._asked:
                self._asked[0].settle()
                self._asked.popleft()
            self._secure.patience(SILENCE_SECONDS)
        except (Broken, OSError):
            return False
        return self._secure.quiet()

    @property
    def ended(self) -> bool:
        return self._secure.ended

    @property
    def stalled(self) -> bool:
        """Whether nothing has come for long enough to try another way. Any thread."""
        return time.monotonic() - self._moved > STALLED_SECONDS

    def drop(self) -> None:
        """End it because this side does not want what comes; who reads gets Broken. Any thread."""
        self.dropped = True
        self._secure.end()

    def close(self) -> None:
        self._secure.close()
