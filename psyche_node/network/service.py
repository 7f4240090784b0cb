"""The methods of ``proto/node.proto`` that this node answers. The guard has said who calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message

from psyche_node.faults import Faults
from psyche_node.network.announcements import MAX_BITMAP, Announcements
from psyche_node.network.blobs import DIGEST_BYTES, PIECE_BYTES, Manifest
from psyche_node.network.guard import Context
from psyche_node.network.holdings import Holdings
from psyche_node.network.messages import MAX_MEMBERS
from psyche_node.network.reports import Traffic
from psyche_node.network.sending import PieceServer, Refused, Status
from psyche_node.network.wire import node_pb2 as wire

SERVICE = "psyche.node.v1.Node"
MAX_ANNOUNCEMENTS_PER_CALL = 64
MAX_DIGESTS_PER_HAVE = 32
MAX_PIECES_PER_MANIFEST = PIECE_BYTES // DIGEST_BYTES
MAX_PARTIAL = 32
MAX_PARTIAL_BYTES = 128 * 1024
# The largest request is a SinceRequest that looks for a blob of every member.
MAX_REQUEST_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = PIECE_BYTES + 64 * 1024
_CODES = {
    Status.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Status.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Status.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class NodeService:
    """The methods. Each takes the caller's node key, the request as bytes, and gRPC's context."""

    def __init__(
        self,
        announcements: Announcements,
        take_announcement: Callable[[bytes, bytes], object],
        holdings: Holdings,
        traffic: Traffic,
        faults: Faults,
        take_offer: Callable[[bytes, bytes], object],
        heard: Callable[[bytes], object],
    ) -> None:
        """``take_announcement(raw, from_key)`` is given every announcement that is pushed.

        ``take_offer(digest, from_key)`` is told who offers which blob to this node, and ``heard`` who calls.
        """
        self._announcements, self._take, self._take_offer = announcements, take_announcement, take_offer
        self._holdings, self._traffic, self._heard = holdings, traffic, heard
        self.pieces = PieceServer(announcements, holdings, traffic, faults, heard)

    def handlers(self) -> Any:
        """Return gRPC's handler of all methods. Requests and replies are raw bytes here; each method parses its own."""
        unary = {
            "Announce": self.announce,
            "Since": self.since,
            "GetManifest": self.manifest,
            "Have": self.have,
        }
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
        wanted = set(request.wanted)
        held = {digest for digest in wanted if self._holdings.complete(digest)}
        reply = wire.SinceReply(
            announcements=self._announcements.missing_from(request.round, request.have),
            held=held,
            partial=self._partial(wanted - held),
        )
        return self._reply(reply, caller)

    def _partial(self, wanted: set[bytes]) -> list[wire.Holding]:
        found: list[wire.Holding] = []
        room = MAX_PARTIAL_BYTES
        for digest in wanted:
            if len(found) < MAX_PARTIAL and (partial := self._holdings.partial(digest)) is not None:
                pieces = partial.bitmap()
                if (room := room - len(pieces)) < 0:
                    break
                found.append(wire.Holding(digest=digest, pieces=pieces))
        return found

    def have(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.HaveRequest()
        self._parse(request, caller, raw, context)
        if len(request.digests) > MAX_DIGESTS_PER_HAVE:
            self._bad(context, f"at most {MAX_DIGESTS_PER_HAVE} digests")
        for digest in request.digests:
            self._check_digest(digest, context)
        for digest in request.digests:
            self._take_offer(digest, caller)
        return self._reply(wire.HaveReply(), caller)

    def manifest(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.ManifestRequest()
        self._parse(request, caller, raw, context)
        self._check_digest(request.digest, context)
        manifest = self._found(request.digest, context)
        if request.first >= max(1, len(manifest.pieces)):
            self._bad(context, f"there are {len(manifest.pieces)} pieces")
        page = manifest.pieces[request.first : request.first + MAX_PIECES_PER_MANIFEST]
        return self._reply(wire.Manifest(length=manifest.length, pieces=b"".join(page)), caller)

    def fetch(self, caller: bytes, raw: bytes, context: Context) -> Iterator[bytes]:
        try:
            sending = self.pieces.open(caller, raw, context.cancel)
            # A callback, not try/finally: gRPC just drops the generator of a call that was cancelled.
            if not context.add_callback(sending.close):
                sending.close()
                return
            yield from sending.pieces()
        except Refused as refused:
            context.abort(_CODES[refused.status], str(refused))

    def _found(self, digest: bytes, context: Context) -> Manifest:
        try:
            return self.pieces.found(digest)
        except Refused as refused:
            context.abort(_CODES[refused.status], str(refused))
            raise AssertionError("abort returned") from None

    def _parse(self, message: Message, caller: bytes, raw: bytes, context: Context) -> None:
        self._traffic.received(caller, len(raw))
        self._heard(caller)
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
