"""The gate of the gRPC server: who is calling, is it a member now, does it ask too often or for too much at once.

Asked on every call: is this TLS 1.3, whose certificate is it, is that node a member now, does the call have a deadline,
has this peer not called too often. What a stranger can cost is a TLS handshake.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import grpc  # type: ignore[import-untyped]

from psyche_node.network.certificates import BadCertificate, identify
from psyche_node.network.directory import Directory
from psyche_node.network.reports import Reporter

MAX_STREAMS = 8
MAX_STREAMS_PER_PEER = 2
MAX_DEADLINE_SECONDS = 600.0
CALLS_PER_SECOND = 100.0
CALLS_AT_ONCE = 600.0

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
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._guarded(handler.stream_unary), handler.request_deserializer, handler.response_serializer
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

    def _guarded(self, behaviour: Callable[[bytes, Any, Context], Any]) -> Callable[[Any, Context], Any]:
        def guarded(request: Any, context: Context) -> Any:
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
