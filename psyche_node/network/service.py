"""The methods of ``proto/node.proto`` that this node answers. The guard has said who calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message

from psyche_node.faults import Faults
from psyche_node.network.announcements import MAX_BITMAP, Announcements
from psyche_node.network.guard import Context, Streams
from psyche_node.network.messages import MAX_MEMBERS
from psyche_node.network.reports import Traffic
from psyche_node.network.store import DIGEST_BYTES, PIECE_BYTES, Reader, StoreError
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
SERVICE = "psyche.node.v1.Node"
MAX_PIECES_PER_FETCH = 16
MAX_ANNOUNCEMENTS_PER_CALL = 64
# The largest request is a SinceRequest that looks for a blob of every member.
MAX_REQUEST_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = PIECE_BYTES + 64 * 1024


class NodeService:
    """The methods. Each takes the caller's node key, the request as bytes, and gRPC's context."""

    def __init__(
        self,
        announcements: Announcements,
        take_announcement: Callable[[bytes, bytes], object],
        reader: Reader,
        traffic: Traffic,
        faults: Faults,
    ) -> None:
        """``take_announcement(raw, from_key)`` is given every announcement that is pushed."""
        self._announcements, self._take = announcements, take_announcement
        self._reader, self._traffic, self._faults = reader, traffic, faults
        self._streams = Streams()

    def handlers(self) -> Any:
        """Return gRPC's handler of all methods. Requests and replies are raw bytes here; each method parses its own."""
        unary = {"Announce": self.announce, "Since": self.since, "GetManifest": self.manifest}
        methods = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in unary.items()}
        methods["Fetch"] = grpc.unary_stream_rpc_method_handler(self.fetch)
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def announce(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.AnnounceRequest()
        self._parse(request, caller, raw, context)
        if len(request.announcements) > MAX_ANNOUNCEMENTS_PER_CALL:
            self._bad(context, f"at most {MAX_ANNOUNCEMENTS_PER_CALL} announcements in a call")
        for announcement in request.announcements:
            self._take(announcement, caller)
        return self._reply(wire.AnnounceReply(), caller)

    def since(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.SinceRequest()
        self._parse(request, caller, raw, context)
        if len(request.have) > MAX_BITMAP or len(request.wanted) > MAX_MEMBERS:
            self._bad(context, f"at most {MAX_BITMAP} bytes of bitmap and {MAX_MEMBERS} digests")
        if any(len(digest) != DIGEST_BYTES for digest in request.wanted):
            self._bad(context, f"a digest is {DIGEST_BYTES} bytes")
        reply = wire.SinceReply(
            announcements=self._announcements.missing_from(request.round, request.have),
            held=[digest for digest in set(request.wanted) if self._reader.holds(digest)],
        )
        return self._reply(reply, caller)

    def manifest(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.ManifestRequest()
        self._parse(request, caller, raw, context)
        self._check_digest(request.digest, context)
        try:
            manifest = self._reader.manifest(request.digest)
        except StoreError as error:
            log.error("%s", error)
            manifest = None
        if manifest is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "this node does not hold the blob")
        assert manifest is not None
        return self._reply(wire.Manifest(length=manifest.length, pieces=b"".join(manifest.pieces)), caller)

    def fetch(self, caller: bytes, raw: bytes, context: Context) -> Iterator[bytes]:
        request = wire.FetchRequest()
        self._parse(request, caller, raw, context)
        self._check_digest(request.digest, context)
        place = self._streams.enter(caller, min(request.count, MAX_PIECES_PER_FETCH) * PIECE_BYTES, context.cancel)
        if place is None:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many open streams; ask another holder, or try again")
        assert place is not None
        # A callback, not try/finally: gRPC just drops the generator of a call that was cancelled.
        if not context.add_callback(lambda: self._streams.leave(place)):
            self._streams.leave(place)
            return
        try:
            manifest = self._reader.manifest(request.digest)
            if manifest is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "this node does not hold the blob")
            assert manifest is not None
            last = request.first + request.count
            if not 1 <= request.count <= MAX_PIECES_PER_FETCH or last > len(manifest.pieces):
                self._bad(context, f"1 to {MAX_PIECES_PER_FETCH} pieces of the {len(manifest.pieces)} that there are")
            for piece in self._reader.pieces(request.digest, range(request.first, last)):
                served = self._faults.served(piece)
                self._traffic.sent(caller, len(served), blob=True)
                yield served
        except StoreError as error:
            log.error("%s", error)
            context.abort(grpc.StatusCode.NOT_FOUND, "this node lost the blob")

    def _parse(self, message: Message, caller: bytes, raw: bytes, context: Context) -> None:
        self._traffic.received(caller, len(raw))
        try:
            message.ParseFromString(raw)
        except DecodeError:
            self._bad(context, "the request does not parse")

    def _reply(self, message: Message, caller: bytes) -> bytes:
        raw = message.SerializeToString()
        self._traffic.sent(caller, len(raw))
        return raw

    def _check_digest(self, digest: bytes, context: Context) -> None:
        if len(digest) != DIGEST_BYTES:
            self._bad(context, f"a digest is {DIGEST_BYTES} bytes")

    @staticmethod
    def _bad(context: Context, reason: str) -> NoReturn:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        raise AssertionError("abort returned")
