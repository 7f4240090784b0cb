"""gRPC calls to other nodes: probe, verify, pin, then call with a deadline.

Python's gRPC cannot be told "this PeerId". So a probe handshake fetches the server's certificate, its libp2p extension
must name the node that is meant, its hash must be the one in that node's signed record, and then a channel is made
whose only root is this very leaf. If somebody else answers later, the handshake fails: the pinned key must be held.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.certificates import BadCertificate, ExpiredCertificate, Leaf, PeerCertificate, identify
from psyche_node.network.directory import Directory
from psyche_node.network.messages import Why
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.service import MAX_MESSAGE_BYTES, SERVICE
from psyche_node.network.statements import NodeRecord, split_address
from psyche_node.network.wire import node_pb2 as wire

PROBE_SECONDS = 3.0
# A private node in what looks like this node's own network did not answer there: so long it is taken to be in another
# one, behind the same NAT, and twice as long each time.
FAR_SECONDS = 60.0
LONGEST_FAR_SECONDS = 3600.0
# A push of which the receiver takes less than a piece in so long is given up; it would not take less than that itself.
PUSH_STALL_SECONDS = 10.0
M = TypeVar("M", bound=Message)


class Cause(StrEnum):
    """Why a call failed."""

    NO_ADDRESS = "no address"
    UNREACHABLE = "unreachable"
    PRIVATE = "behind NAT"
    IDENTITY = "wrong identity"
    REFUSED = "refused"
    BUSY = "busy"
    MISSING = "not there"
    UNWANTED = "not wanted there"
    SLOW = "too slow"
    BROKEN = "broken"


class CallFailed(Exception):
    """A call to a peer failed for ``cause``; the message says who and what."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


_CAUSES = {
    grpc.StatusCode.UNAVAILABLE: Cause.UNREACHABLE,
    grpc.StatusCode.PERMISSION_DENIED: Cause.REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Cause.BUSY,
    grpc.StatusCode.NOT_FOUND: Cause.MISSING,
    grpc.StatusCode.FAILED_PRECONDITION: Cause.UNWANTED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Cause.SLOW,
    # The channel was closed to be made anew, or the server gave the place to somebody else.
    grpc.StatusCode.CANCELLED: Cause.BUSY,
}


def probe(address: str, timeout: float, own: Leaf | None = None) -> PeerCertificate:
    """Return the verified certificate of the gRPC server at ``address`` (IP:port), asked within ``timeout`` seconds.

    ``own`` is shown to a server that asks: to one that gets none, a probe looks like a stranger that is to be refused.
    Raises OSError when nobody answers TLS 1.3 there, and BadCertificate when the certificate names no node.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is trusted here: the certificate is looked at; that its key is held has to be shown to the pinned channel.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    if own is not None:
        show(context, own)
    with (
        socket.create_connection(split_address(address), timeout=timeout) as raw,
        context.wrap_socket(raw) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    if der is None:
        raise BadCertificate("the server shows no certificate")
    return identify(ssl.DER_cert_to_PEM_cert(der).encode())


def show(context: ssl.SSLContext, own: Leaf) -> None:
    """Have this node's certificate shown to the other side."""
    # ssl reads keys from files only; this one is in memory, and gone when it is closed.
    descriptor = os.memfd_create("leaf")
    try:
        os.write(descriptor, own.certificate + own.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


class Path(Protocol):
    """A connection to a private node that was made in another way, for one channel."""

    @property
    def certificate(self) -> PeerCertificate:
        """Whose it must be."""

    @property
    def target(self) -> str:
        """What gRPC dials."""

    @property
    def alive(self) -> bool: ...


class Paths(Protocol):
    """Where paths to private nodes come from."""

    def path(self, peer: bytes, tls_leaf: bytes, *, ask: bool) -> Path | None:
        """Return a path, or None; if ``ask``, one is then made if it can be, which takes a while."""


@dataclass(frozen=True, slots=True)
class _Link:
    channel: Any
    certificate: PeerCertificate
    # What it was made for; another one is made when this changes.
    basis: tuple[str, bytes, bool, Leaf]
    path: Path | None


@dataclass(frozen=True, slots=True)
class _Far:
    """A private node that was not found by these words of its record; its network is not tried before ``due``."""

    address: str
    tls_leaf: bytes
    seconds: float
    due: float


class Stream:
    """The pieces of one Fetch call. ``cancel`` may be called from any thread."""

    def __init__(self, call: Any, failed: Callable[[Any], CallFailed], received: Callable[[int], None]) -> None:
        self._call, self._failed, self._received = call, failed, received
        self._cancelled = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._call:
                self._received(len(piece))
                yield piece
        except grpc.RpcError as error:
            if self._cancelled and error.code() is grpc.StatusCode.CANCELLED:
                raise CallFailed(Cause.SLOW, "nothing came for too long") from None
            raise self._failed(error) from None

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()


class Links:
    """One channel per peer, made when first used and remade when its record changes. Any thread."""

    def __init__(
        self,
        leaf: Callable[[], Leaf],
        directory: Directory,
        reporter: Reporter,
        traffic: Traffic,
        paths: Paths | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``paths`` leads to private nodes; without it they cannot be called."""
        self._leaf, self._directory, self._reporter, self._traffic = leaf, directory, reporter, traffic
        self._paths, self._clock = paths, clock
        self._links: dict[bytes, _Link] = {}
        self._locks: dict[bytes, threading.Lock] = {}
        self._far: dict[bytes, _Far] = {}
        self._failures: dict[bytes, tuple[float, CallFailed]] = {}
        self._lock = threading.Lock()

    def call(self, peer: bytes, method: str, request: Message, reply: type[M], timeout: float) -> M:
        """Make a call to the node with key ``peer`` and return its reply. Raises CallFailed."""
        # A path through NATs is worth making for a blob.
        link = self._link(peer, ask=method == "GetManifest")
        return self.call_over(link.channel, peer, method, request, reply, timeout)

    def call_over(self, channel: Any, peer: bytes, method: str, request: Message, reply: type[M], timeout: float) -> M:
        """As ``call``, over a channel of ``open``."""
        raw = request.SerializeToString()
        self._traffic.sent(peer, len(raw))
        try:
            answer = channel.unary_unary(f"/{SERVICE}/{method}")(raw, timeout=timeout)
        except (grpc.RpcError, ValueError) as error:
            raise self._failure(peer, error) from None
        self._traffic.received(peer, len(answer))
        message = reply()
        try:
            message.ParseFromString(answer)
        except DecodeError as error:
            raise CallFailed(Cause.BROKEN, f"its reply to {method} does not parse: {error}") from None
        return message

    def open(self, peer: bytes, target: str) -> Any:
        """Return a channel to ``peer``, whose certificate is checked first, over another way: gRPC dials ``target``.

        The caller closes it. Raises CallFailed.
        """
        link = self._link(peer)
        return _open(target, link.certificate, link.basis[-1])

    def push(self, peer: bytes, parts: Iterator[bytes], timeout: float) -> None:
        """Send a blob to ``peer`` as Push wants it. Raises CallFailed, too, when it is not taken for some time."""
        link = self._link(peer)
        left, moved = PIECE_BYTES, time.monotonic()

        def counted() -> Iterator[bytes]:
            nonlocal left, moved
            for part in parts:
                self._traffic.sent(peer, len(part), blob=True)
                yield part
                left -= len(part)
                if left <= 0:
                    left, moved = PIECE_BYTES, time.monotonic()

        try:
            call = link.channel.stream_unary(f"/{SERVICE}/Push").future(counted(), timeout=timeout)
            while (wait := moved + PUSH_STALL_SECONDS - time.monotonic()) > 0:
                with contextlib.suppress(grpc.FutureTimeoutError):
                    call.result(wait)
                    return
            call.cancel()
            raise CallFailed(Cause.SLOW, f"it took nothing for {PUSH_STALL_SECONDS:.0f} s")
        except (grpc.RpcError, ValueError) as error:
            if isinstance(error, ValueError) or error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise self._failure(peer, error) from None

    def fetch(
        self,
        peer: bytes,
        digest: bytes,
        first: int,
        count: int,
        timeout: float,
        kind: wire.Kind.ValueType = wire.UPDATE,
    ) -> Stream:
        """Start to fetch pieces. What comes has not been checked. Raises CallFailed, here and while reading."""
        raw = wire.FetchRequest(digest=digest, first=first, count=count, kind=kind).SerializeToString()
        link = self._link(peer, ask=True)
        self._traffic.sent(peer, len(raw))
        try:
            call = link.channel.unary_stream(f"/{SERVICE}/Fetch")(raw, timeout=timeout)
        except ValueError as error:
            raise self._failure(peer, error) from None
        return Stream(
            call,
            lambda error: self._failure(peer, error),
            lambda count: self._traffic.received(peer, count, blob=True),
        )

    def retain(self, peers: Container[bytes]) -> None:
        """Close the channels to all other nodes."""
        with self._lock:
            gone = [self._links.pop(peer) for peer in list(self._links) if peer not in peers]
            self._far = {peer: far for peer, far in list(self._far.items()) if peer in peers}
            self._failures = {peer: failure for peer, failure in list(self._failures.items()) if peer in peers}
        for link in gone:
            link.channel.close()

    def close(self) -> None:
        self.retain(())

    def _link(self, peer: bytes, *, ask: bool = False) -> _Link:
        record = self._directory.record(peer)
        if record is None:
            raise CallFailed(Cause.NO_ADDRESS, "its address is not known yet")
        with self._lock:
            lock = self._locks.setdefault(peer, threading.Lock())
        asked = time.monotonic()
        with lock:
            failed_at, failure = self._failures.get(peer, (0.0, None))
            if failure is not None and failed_at >= asked:
                # Somebody else tried while this thread waited; to try again would let all wait for one another.
                raise CallFailed(failure.cause, str(failure))
            own = self._leaf()
            link = self._links.get(peer)
            hidden = self._directory.hidden(record) or self._is_far(record, link)
            basis = (record.grpc_address, record.tls_leaf, hidden, own)
            if link is not None:
                if link.basis == basis and (link.path is None or link.path.alive):
                    return link
                link.channel.close()
                del self._links[peer]
            if hidden:
                # A public node gets by push what a private one makes; a path is for two that are both private.
                ask = ask and self._directory.own_private()
                path = None if self._paths is None else self._paths.path(peer, record.tls_leaf, ask=ask)
                if path is None:
                    raise CallFailed(Cause.PRIVATE, "it is behind NAT, and there is no path through to it")
                link = _Link(_open(path.target, path.certificate, own), path.certificate, basis, path)
            else:
                try:
                    certificate = self._identify(record, own)
                except CallFailed as error:
                    self._failures[peer] = (time.monotonic(), error)
                    if record.is_private:
                        # Behind a NAT that is shared by many networks, or just started anew: another way for a while.
                        self._found_far(record)
                    raise
                self._failures.pop(peer, None)
                self._far.pop(peer, None)
                link = _Link(_open(record.grpc_address, certificate, own), certificate, basis, None)
            self._links[peer] = link
            return link

    def _is_far(self, record: NodeRecord, link: _Link | None) -> bool:
        far = self._far.get(record.node_key)
        if far is None or (far.address, far.tls_leaf) != (record.grpc_address, record.tls_leaf):
            return False
        # A path that works is not given up for a try.
        on_path = link is not None and link.path is not None and link.path.alive
        return on_path or self._clock() < far.due

    def _found_far(self, record: NodeRecord) -> None:
        far, seconds = self._far.get(record.node_key), FAR_SECONDS
        if far is not None and (far.address, far.tls_leaf) == (record.grpc_address, record.tls_leaf):
            seconds = min(2 * far.seconds, LONGEST_FAR_SECONDS)
        self._far[record.node_key] = _Far(record.grpc_address, record.tls_leaf, seconds, self._clock() + seconds)

    def _identify(self, record: NodeRecord, own: Leaf) -> PeerCertificate:
        """Return the certificate that the node shows at its address, if it is the one in its record."""
        address = record.grpc_address
        try:
            certificate = probe(address, PROBE_SECONDS, own)
        except (OSError, BadCertificate) as error:
            if isinstance(error, BadCertificate):
                why = Why.EXPIRED if isinstance(error, ExpiredCertificate) else Why.IDENTITY
                self._reporter.rejected("certificate", record.node_key, f"at {address}: {error}", why)
            cause = Cause.IDENTITY if isinstance(error, BadCertificate) else Cause.UNREACHABLE
            raise CallFailed(cause, f"the probe of {address} failed: {error}") from None
        if certificate.node_key != record.node_key:
            self._reporter.rejected(
                "certificate",
                certificate.node_key,
                f"it answers at {address}, which {record.node_id} announced",
                Why.IDENTITY,
            )
            raise CallFailed(Cause.IDENTITY, f"another node answers at {address}")
        if certificate.der_hash != record.tls_leaf:
            raise CallFailed(Cause.IDENTITY, f"the certificate at {address} is not the one in the node's record")
        return certificate

    def _failure(self, peer: bytes, error: Any) -> CallFailed:
        if isinstance(error, ValueError):
            # What gRPC says of a channel that another thread closed in this moment, because the node's record changed.
            return CallFailed(Cause.BUSY, "the connection to it is being made anew")
        code = error.code()
        cause = _CAUSES.get(code, Cause.BROKEN)
        return CallFailed(cause, f"{cause}: {str(error.details() or code)[:200]}")


def _open(target: str, certificate: PeerCertificate, own: Leaf) -> Any:
    """Return a channel that talks to the holder of ``certificate`` and to nobody else."""
    return grpc.secure_channel(
        target,
        grpc.ssl_channel_credentials(certificate.pem, own.key, own.certificate),
        options=[
            ("grpc.ssl_target_name_override", certificate.name),
            # A shared pool would let a channel reuse another identity's connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ],
    )
