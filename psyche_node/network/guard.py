"""The gate of the gRPC server: who is calling, is it a member now, does it ask too often or for too much at once.

Asked on every call: is this TLS 1.3, whose certificate is it, is that node a member now, does the call have a deadline,
has this peer not called too often. What a stranger can cost is a TLS handshake. Every refusal is logged and counted;
docs/decisions/0023-hostile-peers.md has the limits and what each is for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]

from psyche_node.network.cap import Cap
from psyche_node.network.certificates import BadCertificate, ExpiredCertificate, identify
from psyche_node.network.directory import Directory
from psyche_node.network.messages import Why
from psyche_node.network.reports import Reporter

MAX_STREAMS = 32
MAX_STREAMS_PER_PEER = 8
MAX_DEADLINE_SECONDS = 600.0
CALLS_PER_SECOND = 100.0
CALLS_AT_ONCE = 600.0
# A call counts once, and once more for each of these: some 30 digests to look for, or as much of a reply as is read,
# copied and encrypted in about the time of a call.
REQUEST_BYTES_PER_CALL = 1024
REPLY_BYTES_PER_CALL = 64 * 1024
MAX_PACED = 4096
MAX_CALLS = 1024
MAX_CALLS_PER_PEER = 32
# In which a stream sends a piece: 1 MiB over a line of 2 Mbit/s takes 4 s.
STREAM_SECONDS = 9.0

Context = Any  # grpc.ServicerContext; grpcio has no types


class Pace:
    """Calls per second and peer: a bucket that holds ``burst`` calls and refills at ``rate`` calls a second.

    A call that costs as much as several is charged afterwards, when that is known; a peer may owe one bucket.
    """

    def __init__(
        self, rate: float = CALLS_PER_SECOND, burst: float = CALLS_AT_ONCE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: dict[bytes, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, peer: bytes) -> bool:
        """Count a call of ``peer``, if its bucket holds one."""
        with self._lock:
            left, now = self._level(peer)
            self._buckets[peer] = (left - 1 if left >= 1 else left, now)
            return left >= 1

    def charge(self, peer: bytes, calls: int) -> None:
        """Count as many calls more, whether the bucket holds them or not."""
        with self._lock:
            left, now = self._level(peer)
            self._buckets[peer] = (max(left - calls, -self._burst), now)

    def _level(self, peer: bytes) -> tuple[float, float]:
        now = self._clock()
        if len(self._buckets) >= MAX_PACED and peer not in self._buckets:
            # The oldest ones; whoever is forgotten starts anew with a full bucket.
            for other in list(self._buckets)[: MAX_PACED // 4]:
                del self._buckets[other]
        left, since = self._buckets.get(peer, (self._burst, now))
        return min(self._burst, left + (now - since) * self._rate), now


class NotAdmitted(Exception):
    """A call is refused, which is not reported yet. ``peer`` is a node key, or an address when there is no key."""

    def __init__(self, peer: bytes | str, reason: str, why: Why) -> None:
        super().__init__(reason)
        self.peer, self.why = peer, why


class Guard:
    """The gate of the server. ``caller`` says who a call is from, and refuses it unless that is a member."""

    def __init__(self, directory: Directory, reporter: Reporter) -> None:
        self._directory, self._reporter = directory, reporter
        self._pace = Pace()
        self._open = Cap(MAX_CALLS, MAX_CALLS_PER_PEER)

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Put the guard in front of a method (gRPC calls this for every call)."""
        handler = continuation(details)
        if handler is None:
            return None
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(handler.unary_stream), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._guarded(handler.stream_unary), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(self._priced(handler.unary_unary)), handler.request_deserializer, handler.response_serializer
        )

    def caller(self, context: Context) -> bytes:
        """Return the node key of a member that calls. Ends the call otherwise."""
        auth = context.auth_context()
        where = str(context.peer())
        if auth.get("ssl_tls_version") != [b"TLSv1.3"]:
            self._refuse(context, where, f"it spoke {auth.get('ssl_tls_version')}, not TLS 1.3", Why.PROTOCOL)
        key = self._member(context, (auth.get("x509_pem_cert") or [b""])[0], where)
        remaining = context.time_remaining()
        if remaining is None or remaining > MAX_DEADLINE_SECONDS:
            reason = f"set a deadline of at most {MAX_DEADLINE_SECONDS:.0f} s"
            self._refuse(context, key, reason, Why.PROTOCOL, grpc.StatusCode.INVALID_ARGUMENT)
        try:
            self.pace(key)
        except NotAdmitted as error:
            self._refuse(context, key, str(error), error.why, grpc.StatusCode.RESOURCE_EXHAUSTED)
        return key

    def member(self, pem: bytes, where: str) -> bytes:
        """Return the node key that the certificate of a TLS 1.3 peer names. Raises NotAdmitted unless it is a member's.

        ``where`` is the address that it calls from.
        """
        try:
            key = identify(pem).node_key
        except BadCertificate as error:
            why = Why.EXPIRED if isinstance(error, ExpiredCertificate) else Why.IDENTITY
            raise NotAdmitted(where, str(error), why) from None
        if self._directory.slot(key) is None:
            reason = f"its key is not that of a member of the run (it called from {where})"
            raise NotAdmitted(key, reason, Why.NOT_A_MEMBER)
        return key

    def pace(self, key: bytes) -> None:
        """Count a call of a member. Raises NotAdmitted when it makes too many."""
        if not self._pace.allows(key):
            raise NotAdmitted(key, f"more than {CALLS_PER_SECOND:.0f} calls a second", Why.TOO_MANY)

    @contextlib.contextmanager
    def call(self, key: bytes) -> Iterator[None]:
        """Be in a call of a member that does not come by gRPC. Raises NotAdmitted."""
        self.pace(key)
        if not self._open.enter(key):
            raise NotAdmitted(key, f"more than {MAX_CALLS_PER_PEER} calls at a time", Why.TOO_MANY)
        try:
            yield
        finally:
            self._open.leave(key)

    def _member(self, context: Context, pem: bytes, where: str) -> bytes:
        try:
            return self.member(pem, where)
        except NotAdmitted as error:
            self._refuse(context, error.peer, str(error), error.why)

    def _guarded(self, behaviour: Callable[[bytes, Any, Context], Any]) -> Callable[[Any, Context], Any]:
        def guarded(request: Any, context: Context) -> Any:
            key = self.caller(context)
            # Until its answer has been read, not only until it has been given: an answer that nobody reads is memory.
            if not self._open.enter(key):
                reason = f"more than {MAX_CALLS_PER_PEER} calls at a time"
                self._refuse(context, key, reason, Why.TOO_MANY, grpc.StatusCode.RESOURCE_EXHAUSTED)
            if not context.add_callback(lambda: self._open.leave(key)):
                self._open.leave(key)
            return behaviour(key, request, context)

        return guarded

    def _priced(self, behaviour: Callable[[bytes, bytes, Context], bytes]) -> Callable[[bytes, bytes, Context], bytes]:
        def priced(key: bytes, request: bytes, context: Context) -> bytes:
            self._pace.charge(key, len(request) // REQUEST_BYTES_PER_CALL)
            reply = behaviour(key, request, context)
            self._pace.charge(key, len(reply) // REPLY_BYTES_PER_CALL)
            return reply

        return priced

    def _refuse(
        self,
        context: Context,
        peer: bytes | str,
        reason: str,
        why: Why,
        code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED,
    ) -> NoReturn:
        self._reporter.rejected("call", peer, reason, why)
        # Strangers are not told more; a member is told what it did wrong.
        denied = code is grpc.StatusCode.PERMISSION_DENIED
        context.abort(code, "only members of the run, by their node key over TLS 1.3" if denied else reason)
        raise AssertionError("abort returned")


@dataclass(eq=False, slots=True)
class Place:
    """A stream's place among the open ones. ``end`` ends its call; it is overdue from ``due`` on (seconds)."""

    peer: bytes
    due: float
    end: Callable[[], object]


class Streams:
    """Caps on open uploads, in all and per peer.

    A stream has a time in which even a slow link takes a piece. One that has not got on for so long is ended as soon as
    another call wants its place: a peer that does not read holds a place for that long, whatever deadline it set. And
    one that reads just fast enough does not keep others out: who has no place takes one of whoever has most.
    """

    def __init__(
        self,
        total: int = MAX_STREAMS,
        per_peer: int = MAX_STREAMS_PER_PEER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._per_peer, self._clock = total, per_peer, clock
        self._open: list[Place] = []
        self._lock = threading.Lock()

    def enter(self, peer: bytes, end: Callable[[], object]) -> Place | None:
        """Take a place for a stream, whose call ``end`` ends; None: there is no free one."""
        now = self._clock()
        place = Place(peer, now + STREAM_SECONDS, end)
        ended: list[Place] = []
        with self._lock:
            if not self._free(peer):
                ended = [late for late in self._open if late.due <= now]
                self._open = [other for other in self._open if other.due > now]
            if not self._free(peer) and (spare := self._spare(peer)) is not None:
                ended.append(spare)
                self._open.remove(spare)
            if free := self._free(peer):
                self._open.append(place)
        for other in ended:
            other.end()
        return place if free else None

    def moves(self, place: Place) -> None:
        """The stream got on: its next piece is about to be sent."""
        place.due = self._clock() + STREAM_SECONDS

    def leave(self, place: Place) -> None:
        with self._lock:
            if place in self._open:
                self._open.remove(place)

    def _spare(self, peer: bytes) -> Place | None:
        """Return the place that a peer without one may take: of the peer with most, the one that moved least lately."""
        counts = Counter(place.peer for place in self._open)
        most, count = counts.most_common(1)[0]
        if counts[peer] or count == 1:
            return None
        return min((place for place in self._open if place.peer == most), key=lambda place: place.due)

    def _free(self, peer: bytes) -> bool:
        return len(self._open) < self._total and sum(place.peer == peer for place in self._open) < self._per_peer
