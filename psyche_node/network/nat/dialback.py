"""The method DialBack: tells a member where its call comes from, and whether its server answers there.

It dials the address that the call came from and no other, so nobody can be sent anywhere by it: at most once in
``DIAL_EVERY`` per member, and a few at the same time in all. What was seen is kept for a minute: punches go only to
addresses that a helper has seen itself.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError

from psyche_node.network.cap import Cap
from psyche_node.network.certificates import BadCertificate, PeerCertificate
from psyche_node.network.guard import Context
from psyche_node.network.nat.sockets import peer_address
from psyche_node.network.service import SERVICE
from psyche_node.network.statements import join_address, split_address
from psyche_node.network.wire import node_pb2 as wire

DIAL_SECONDS = 2.0
DIAL_EVERY = 2.0
MAX_DIALS = 4
SEEN_SECONDS = 60.0
_SEEN_PER_PEER = 8
_MAX_REQUEST = 64


class DialBack:
    """Answers DialBack, and remembers where members' calls came from. Any thread."""

    def __init__(
        self, probe: Callable[[str, float], PeerCertificate], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``probe(address, seconds)`` returns the certificate that the server there shows."""
        self._probe, self._clock = probe, clock
        self._dials = Cap(MAX_DIALS, 1)
        self._lock = threading.Lock()
        self._seen: dict[bytes, deque[tuple[float, str]]] = {}
        self._dialled: dict[bytes, float] = {}

    def handlers(self) -> Any:
        methods = {"DialBack": grpc.unary_unary_rpc_method_handler(self.answer)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def seen_at(self, peer: bytes, address: str) -> bool:
        """Return whether a call of ``peer`` came from ``address`` within the last minute."""
        since = self._clock() - SEEN_SECONDS
        with self._lock:
            return any(at >= since and where == address for at, where in self._seen.get(peer, ()))

    def answer(self, caller: bytes, raw: bytes, context: Context) -> bytes:
        request = wire.DialBackRequest()
        try:
            if len(raw) > _MAX_REQUEST:
                raise DecodeError("too long")
            request.ParseFromString(raw)
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request does not parse")
        observed = peer_address(str(context.peer()))
        if observed is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this call did not come straight over a network")
        assert observed is not None
        with self._lock:
            self._seen.setdefault(caller, deque(maxlen=_SEEN_PER_PEER)).append((self._clock(), observed))
        reached = False
        if request.port:
            if not 0 < request.port < 65536:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a port is 1 to 65535")
            reached = self._dial(caller, join_address(split_address(observed)[0], request.port), context)
        return wire.DialBackReply(observed=observed, reached=reached).SerializeToString()

    def _dial(self, caller: bytes, address: str, context: Context) -> bool:
        now = self._clock()
        with self._lock:
            early = now - self._dialled.get(caller, -DIAL_EVERY) < DIAL_EVERY
            if not early:
                self._dialled[caller] = now
        if early or not self._dials.enter(caller):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many dials asked for; ask another node, or later")
        try:
            return self._probe(address, DIAL_SECONDS).node_key == caller
        except (OSError, BadCertificate):
            return False
        finally:
            self._dials.leave(caller)
