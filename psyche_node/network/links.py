"""gRPC calls to other nodes: probe, verify, pin, then call with a deadline.

Python's gRPC cannot be told "this PeerId". So a probe handshake fetches the server's certificate, its libp2p extension
must name the node that is meant, its hash must be the one in that node's signed record, and then a channel is made
whose only root is this very leaf. If somebody else answers later, the handshake fails: the pinned key must be held.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message

from psyche_node.network.certificates import BadCertificate, ExpiredCertificate, Leaf, PeerCertificate, identify
from psyche_node.network.directory import Directory
from psyche_node.network.messages import Why
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.service import MAX_MESSAGE_BYTES, SERVICE
from psyche_node.network.statements import NodeRecord, split_address
from psyche_node.network.wire import node_pb2 as wire

PROBE_SECONDS = 3.0
M = TypeVar("M", bound=Message)


class Cause(StrEnum):
    """Why a call failed."""

    NO_ADDRESS = "no address"
    UNREACHABLE = "unreachable"
    IDENTITY = "wrong identity"
    REFUSED = "refused"
    BUSY = "busy"
    MISSING = "not there"
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
    grpc.StatusCode.DEADLINE_EXCEEDED: Cause.SLOW,
    grpc.StatusCode.CANCELLED: Cause.SLOW,
}


def probe(address: str, timeout: float = PROBE_SECONDS) -> PeerCertificate:
    """Return the verified certificate of the gRPC server at ``address`` (IP:port).

    Raises OSError when nobody answers TLS 1.3 there, and BadCertificate when the certificate names no node.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Nothing is trusted here: the certificate is looked at; that its key is held has to be shown to the pinned channel.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(split_address(address), timeout=timeout) as raw,
        context.wrap_socket(raw) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    if der is None:
        raise BadCertificate("the server shows no certificate")
    return identify(ssl.DER_cert_to_PEM_cert(der).encode())


@dataclass(frozen=True, slots=True)
class _Link:
    channel: Any
    address: str
    tls_leaf: bytes
    own: Leaf


class Stream:
    """The pieces of one Fetch call. ``cancel`` may be called from any thread."""

    def __init__(self, call: Any, failed: Callable[[Any], CallFailed], received: Callable[[int], None]) -> None:
        self._call, self._failed, self._received = call, failed, received

    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._call:
                self._received(len(piece))
                yield piece
        except grpc.RpcError as error:
            raise self._failed(error) from None

    def cancel(self) -> None:
        self._call.cancel()


class Links:
    """One channel per peer, made when first used and remade when its record changes. Any thread."""

    def __init__(self, leaf: Callable[[], Leaf], directory: Directory, reporter: Reporter, traffic: Traffic) -> None:
        self._leaf, self._directory, self._reporter, self._traffic = leaf, directory, reporter, traffic
        self._links: dict[bytes, _Link] = {}
        self._locks: dict[bytes, threading.Lock] = {}
        self._lock = threading.Lock()

    def call(self, peer: bytes, method: str, request: Message, reply: type[M], timeout: float) -> M:
        """Make a call to the node with key ``peer`` and return its reply. Raises CallFailed."""
        raw = request.SerializeToString()
        link = self._link(peer)
        self._traffic.sent(peer, len(raw))
        try:
            answer = link.channel.unary_unary(f"/{SERVICE}/{method}")(raw, timeout=timeout)
        except grpc.RpcError as error:
            raise self._failure(peer, error) from None
        self._traffic.received(peer, len(answer))
        message = reply()
        try:
            message.ParseFromString(answer)
        except DecodeError as error:
            raise CallFailed(Cause.BROKEN, f"its reply to {method} does not parse: {error}") from None
        return message

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
        link = self._link(peer)
        self._traffic.sent(peer, len(raw))
        call = link.channel.unary_stream(f"/{SERVICE}/Fetch")(raw, timeout=timeout)
        return Stream(
            call,
            lambda error: self._failure(peer, error),
            lambda count: self._traffic.received(peer, count, blob=True),
        )

    def retain(self, peers: Container[bytes]) -> None:
        """Close the channels to all other nodes."""
        with self._lock:
            gone = [self._links.pop(peer) for peer in list(self._links) if peer not in peers]
        for link in gone:
            link.channel.close()

    def close(self) -> None:
        self.retain(())

    def _link(self, peer: bytes) -> _Link:
        record = self._directory.record(peer)
        if record is None:
            raise CallFailed(Cause.NO_ADDRESS, "its address is not known yet")
        with self._lock:
            lock = self._locks.setdefault(peer, threading.Lock())
        with lock:
            own = self._leaf()
            link = self._links.get(peer)
            if link is not None:
                if (link.address, link.tls_leaf, link.own) == (record.grpc_address, record.tls_leaf, own):
                    return link
                link.channel.close()
            self._links[peer] = link = self._connect(record, own)
            return link

    def _connect(self, record: NodeRecord, own: Leaf) -> _Link:
        address = record.grpc_address
        try:
            certificate = probe(address)
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
        channel = grpc.secure_channel(
            address,
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
        return _Link(channel, address, record.tls_leaf, own)

    def _failure(self, peer: bytes, error: Any) -> CallFailed:
        code = error.code()
        cause = _CAUSES.get(code, Cause.BROKEN)
        return CallFailed(cause, f"{cause}: {str(error.details() or code)[:200]}")
