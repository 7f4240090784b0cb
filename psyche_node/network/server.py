"""The gRPC server: one guard in front of every method, and the four methods of ``proto/node.proto``.

The guard asks, on every call: is this TLS 1.3, whose certificate is it, is that node a member now, does the call have a
deadline, has this peer not called too often. What a stranger can cost is a TLS handshake.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message

from psyche_node.faults import Faults
from psyche_node.network.announcements import MAX_BITMAP, Announcements
from psyche_node.network.certificates import BadCertificate, Leaf, identify, null_ca_pem
from psyche_node.network.directory import Directory
from psyche_node.network.messages import MAX_MEMBERS
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.statements import join_address
from psyche_node.network.store import DIGEST_BYTES, PIECE_BYTES, Reader, StoreError
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
SERVICE = "psyche.node.v1.Node"
MAX_PIECES_PER_FETCH = 16
MAX_ANNOUNCEMENTS_PER_CALL = 64
MAX_STREAMS = 8
MAX_STREAMS_PER_PEER = 2
MAX_DEADLINE_SECONDS = 600.0
CALLS_PER_SECOND = 100.0
CALLS_AT_ONCE = 600.0
# The largest request is a SinceRequest that looks for a blob of every member.
MAX_REQUEST_BYTES = 64 * 1024
MAX_MESSAGE_BYTES = PIECE_BYTES + 64 * 1024
# One thread per open call: streams, and as many short calls next to them.
_WORKERS = 2 * MAX_STREAMS

Context = Any  # grpc.ServicerContext; grpcio has no types


class Pace:
    """Calls per second and peer: a bucket that holds ``burst`` calls and refills at ``rate`` calls a second."""

    def __init__(
        self, rate: float = CALLS_PER_SECOND, burst: float = CALLS_AT_ONCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: dict[bytes, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, peer: bytes) -> bool:
        now = self._clock()
        with self._lock:
            left, since = self._buckets.get(peer, (self._burst, now))
            left = min(self._burst, left + (now - since) * self._rate)
            self._buckets[peer] = (left - 1 if left >= 1 else left, now)
            return left >= 1


class Guard:
    """The gate of the server. ``caller`` says who a call is from, and refuses it unless that is a member."""

    def __init__(self, directory: Directory, reporter: Reporter) -> None:
        self._directory, self._reporter = directory, reporter
        self._pace = Pace()

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Put the guard in front of a method (gRPC calls this for every call)."""
        handler = continuation(details)
        if handler is None:
            return None
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def caller(self, context: Context) -> bytes:
        """Return the node key of a member that calls. Ends the call otherwise."""
        auth = context.auth_context()
        where = str(context.peer())
        if auth.get("ssl_tls_version") != [b"TLSv1.3"]:
            self._refuse(context, where, f"it spoke {auth.get('ssl_tls_version')}, not TLS 1.3")
        chain = auth.get("x509_pem_cert") or [b""]
        try:
            key = identify(chain[0]).node_key
        except BadCertificate as error:
            self._refuse(context, where, str(error))
        if self._directory.slot(key) is None:
            self._refuse(context, key, f"its key is not that of a member of the run (it called from {where})")
        remaining = context.time_remaining()
        if remaining is None or remaining > MAX_DEADLINE_SECONDS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"set a deadline of at most {MAX_DEADLINE_SECONDS:.0f} s")
        if not self._pace.allows(key):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {CALLS_PER_SECOND:.0f} calls a second")
        return key

    def _guarded(self, behaviour: Callable[[bytes, bytes, Context], Any]) -> Callable[[bytes, Context], Any]:
        def guarded(request: bytes, context: Context) -> Any:
            return behaviour(self.caller(context), request, context)

        return guarded

    def _refuse(self, context: Context, peer: bytes | str, reason: str) -> NoReturn:
        self._reporter.rejected("call", peer, reason)
        context.abort(grpc.StatusCode.PERMISSION_DENIED, "only members of the run, by their node key over TLS 1.3")
        raise AssertionError("abort returned")


class Streams:
    """Caps on open uploads, in all and per peer."""

    def __init__(self, total: int = MAX_STREAMS, per_peer: int = MAX_STREAMS_PER_PEER) -> None:
        self._total, self._per_peer = total, per_peer
        self._open: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def enter(self, peer: bytes) -> bool:
        with self._lock:
            if self._open.total() >= self._total or self._open[peer] >= self._per_peer:
                return False
            self._open[peer] += 1
            return True

    def leave(self, peer: bytes) -> None:
        with self._lock:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]


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
        if not self._streams.enter(caller):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many open streams; ask another holder, or try again")
        # A callback, not try/finally: gRPC just drops the generator of a call that was cancelled.
        if not context.add_callback(lambda: self._streams.leave(caller)):
            self._streams.leave(caller)
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


class ServerUnavailable(Exception):
    """The server cannot listen; the message says where and what to do."""


class Server:
    """The gRPC server. ``leaf`` is asked at every handshake, so a renewed certificate needs no restart."""

    def __init__(self, host: str, port: int, leaf: Callable[[], Leaf], guard: Guard, service: NodeService) -> None:
        self._leaf = leaf
        self._shown: Leaf | None = None
        self._server = grpc.server(
            ThreadPoolExecutor(_WORKERS, thread_name_prefix="grpc"),
            interceptors=[guard],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
            maximum_concurrent_rpcs=4 * _WORKERS,
        )
        self._server.add_generic_rpc_handlers((service.handlers(),))
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._renewed, require_client_authentication=True
        )
        address = join_address(host, port)
        try:
            self.port = int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise ServerUnavailable(f"gRPC cannot listen on {address}: {error}. Is the port taken?") from error
        if not self.port:
            raise ServerUnavailable(f"gRPC cannot listen on {address}. Is the port taken?")
        self._server.start()

    def stop(self) -> None:
        """End open calls at once and wait for their threads, a second at most."""
        self._server.stop(grace=None).wait(1.0)

    def _configuration(self) -> Any:
        self._shown = leaf = self._leaf()
        return grpc.ssl_server_certificate_configuration([(leaf.key, leaf.certificate)], null_ca_pem())

    def _renewed(self) -> Any:
        return self._configuration() if self._leaf() is not self._shown else None
