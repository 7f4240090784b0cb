"""Serving pieces of blobs: what is the same however the bytes travel, by gRPC or over a bulk connection."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from enum import IntEnum

from google.protobuf.message import DecodeError

from psyche_node.faults import Faults
from psyche_node.network.announcements import Announcements
from psyche_node.network.blobs import DIGEST_BYTES, Manifest, StoreError
from psyche_node.network.holdings import Holdings
from psyche_node.network.messages import Kind
from psyche_node.network.reports import Traffic
from psyche_node.network.turns import Rank, rank
from psyche_node.network.uploads import Upload, Uploads
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
MAX_PIECES_PER_FETCH = 64
KINDS = {wire.UPDATE: Kind.UPDATE, wire.CHECKPOINT: Kind.CHECKPOINT, wire.MODEL: Kind.MODEL}


class Status(IntEnum):
    """How a request ended. The numbers are gRPC's."""

    OK = 0
    INVALID = 3
    NOT_FOUND = 5
    DENIED = 7
    EXHAUSTED = 8


class Refused(Exception):
    """A request is not answered, or not to its end; the message says why, and goes to the peer."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class PieceServer:
    """Answers FetchRequests of members. Any thread; one upload of a peer counts like another, whatever it came over."""

    def __init__(
        self,
        announcements: Announcements,
        holdings: Holdings,
        traffic: Traffic,
        faults: Faults,
        heard: Callable[[bytes], object],
    ) -> None:
        """``heard`` is told who asks."""
        self._announcements, self._holdings = announcements, holdings
        self._traffic, self._faults, self._heard = traffic, faults, heard
        self._uploads = Uploads()

    def open(self, caller: bytes, raw: bytes, end: Callable[[], object], *, bulk: bool = False) -> Sending:
        """Take a place for a serialized FetchRequest. ``end`` may be called, from any thread, to give it to another.

        ``bulk`` is for the statistics: that the bytes go over a bulk connection. Raises Refused.
        """
        self._traffic.received(caller, len(raw))
        self._heard(caller)
        request = wire.FetchRequest()
        try:
            request.ParseFromString(raw)
        except DecodeError:
            raise Refused(Status.INVALID, "the request does not parse") from None
        if len(request.digest) != DIGEST_BYTES:
            raise Refused(Status.INVALID, f"a digest is {DIGEST_BYTES} bytes")
        upload = self._uploads.enter(caller, self._rank(request), end)
        if upload is None:
            raise Refused(Status.EXHAUSTED, "too many open streams; ask another holder, or try again")
        return Sending(self, caller, request, upload, bulk)

    def found(self, digest: bytes) -> Manifest:
        """Return the manifest of a blob that is here, whole or in part. Raises Refused."""
        try:
            manifest = self._holdings.manifest(digest)
        except StoreError as error:
            log.error("%s", error)
            manifest = None
        if manifest is None:
            raise Refused(Status.NOT_FOUND, "this node does not hold the blob")
        return manifest

    def _rank(self, request: wire.FetchRequest) -> Rank:
        kind, round = self._holdings.known(request.digest) or (
            KINDS.get(request.kind, Kind.MODEL),
            self._announcements.current,
        )
        return rank(kind, round, self._announcements.current)

    def _pieces(self, caller: bytes, request: wire.FetchRequest, upload: Upload, bulk: bool) -> Iterator[bytes]:
        manifest = self.found(request.digest)
        last = request.first + request.count
        if not 1 <= request.count <= MAX_PIECES_PER_FETCH or last > len(manifest.pieces):
            raise Refused(
                Status.INVALID, f"1 to {MAX_PIECES_PER_FETCH} pieces of the {len(manifest.pieces)} that there are"
            )
        try:
            for piece in self._holdings.pieces(request.digest, range(request.first, last)):
                if not self._uploads.next_piece(upload, request.digest, manifest.length, len(piece)):
                    raise Refused(Status.EXHAUSTED, "you had this blob more than twice")
                served = self._faults.served(piece)
                self._traffic.sent(caller, len(served), blob=True, bulk=bulk)
                yield served
        except StoreError as error:
            log.error("%s", error)
            raise Refused(Status.NOT_FOUND, "this node lost the blob") from None


class Sending:
    """One upload. ``close`` must be called once it is over, however it ended; more than once does no harm."""

    def __init__(
        self, server: PieceServer, caller: bytes, request: wire.FetchRequest, upload: Upload, bulk: bool
    ) -> None:
        self._server, self._caller, self._request, self._upload, self._bulk = server, caller, request, upload, bulk

    def pieces(self) -> Iterator[bytes]:
        """Yield the pieces in order, each when it is this upload's turn. Raises Refused."""
        return self._server._pieces(self._caller, self._request, self._upload, self._bulk)

    def close(self) -> None:
        self._server._uploads.leave(self._upload)
