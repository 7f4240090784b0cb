"""The listener of the bulk port: a thread per connection, the guard before each request, and a bound on everything.

What each bound is for says docs/decisions/0023-hostile-peers.md.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from psyche_node.network.bulk import frames
from psyche_node.network.bulk.secure import Broken, Contexts, Secure, server_context
from psyche_node.network.cap import Cap
from psyche_node.network.certificates import BadCertificate, ExpiredCertificate, Leaf, PeerCertificate
from psyche_node.network.corelog import classify
from psyche_node.network.guard import MAX_DEADLINE_SECONDS, Guard, NotAdmitted, Pace
from psyche_node.network.messages import Why
from psyche_node.network.reports import Reporter
from psyche_node.network.sending import PieceServer, Refused, Status
from psyche_node.network.server import ServerUnavailable
from psyche_node.network.statements import join_address

log = logging.getLogger(__name__)
STOP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may cost, whoever they are of."""

    connections: int = 128
    """Of members. When all are taken, one that is idle makes room."""
    connections_per_peer: int = 8
    handshakes: int = 48
    handshakes_per_address: int = 16
    handshake_seconds: float = 10.0
    attempts_per_second: float = 10.0
    """Of an address, after the first ``attempts_at_once``."""
    attempts_at_once: float = 300.0
    idle_seconds: float = 120.0
    request_seconds: float = 10.0
    """From a request's first byte to its last."""
    stall_seconds: float = 30.0
    """In which a peer takes 1 MiB. After 9 s without a piece its place goes to whoever wants it (``guard.Streams``)."""


DEFAULT_LIMITS = Limits()


class Connection:
    """A connection of a member."""

    def __init__(self, secure: Secure, certificate: PeerCertificate, where: str) -> None:
        self.secure, self.certificate, self.where = secure, certificate, where
        self.idle_since: float | None = None


class BulkServer:
    """The server. ``leaf`` is asked at every handshake, so a renewed certificate needs no restart."""

    def __init__(
        self,
        host: str,
        port: int,
        leaf: Callable[[], Leaf],
        guard: Guard,
        pieces: PieceServer,
        reporter: Reporter,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Raises ServerUnavailable when the port cannot be had."""
        self._guard, self._pieces, self._reporter, self._limits = guard, pieces, reporter, limits
        self._contexts = Contexts(leaf, server_context)
        self._attempts = Pace(limits.attempts_per_second, limits.attempts_at_once)
        self._handshakes = Cap(limits.handshakes, limits.handshakes_per_address)
        self._members: list[Connection] = []
        self._open: set[Secure] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            address = join_address(host, port)
            raise ServerUnavailable(
                f"the bulk server cannot listen on {address}: {error}. Is the port taken?"
            ) from None
        self.port = int(self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, name="bulk-accept", daemon=True)
        self._accepting.start()

    def stop(self) -> None:
        """End all connections and wait for their threads, a second at most."""
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            threads, connections = [self._accepting, *self._threads], list(self._open)
        for secure in connections:
            secure.end()
        until = time.monotonic() + STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, name = self._listener.accept()
            except OSError as error:
                if not self._stopping.is_set():
                    # Out of descriptors, for example: others may give some back.
                    log.error("no connection can be accepted at the bulk port: %s", error)
                    self._stopping.wait(1.0)
                continue
            ip = str(name[0])
            address = ip.encode()
            if not self._attempts.allows(address):
                self._refuse(sock, ip, "it connects to the bulk port more often than is answered")
            elif not self._handshakes.enter(address):
                self._refuse(sock, ip, "too many handshakes at a time at the bulk port")
            else:
                thread = threading.Thread(target=self._serve, args=(sock, ip, address), name="bulk", daemon=True)
                with self._lock:
                    self._threads.add(thread)
                try:
                    thread.start()
                except RuntimeError as error:
                    # Out of threads; those that are there go on.
                    with self._lock:
                        self._threads.discard(thread)
                    self._handshakes.leave(address)
                    self._refuse(sock, ip, str(error))

    def _refuse(self, sock: socket.socket, ip: str, reason: str) -> None:
        sock.close()
        self._reporter.rejected("connection", ip, reason, Why.TOO_MANY)

    def _serve(self, sock: socket.socket, ip: str, address: bytes) -> None:
        secure = None
        try:
            try:
                secure = Secure(sock, self._contexts.current(), server_side=True)
                with self._lock:
                    self._open.add(secure)
                connection = self._identify(secure, ip)
            finally:
                self._handshakes.leave(address)
            if connection is not None and self._enter(connection):
                try:
                    self._answer_all(connection)
                finally:
                    self._leave(connection)
        except OSError as error:
            log.debug("a connection of %s to the bulk port failed: %s", ip, error)
        finally:
            (secure or sock).close()
            with self._lock:
                self._open.discard(secure) if secure else None
                self._threads.discard(threading.current_thread())

    def _identify(self, secure: Secure, ip: str) -> Connection | None:
        """Return the connection if it is of a member, or None when it has been refused."""
        if self._stopping.is_set():
            return None
        try:
            secure.handshake(self._limits.handshake_seconds)
            connection = Connection(secure, secure.certificate(), ip)
            self._guard.member(connection.certificate.pem, ip)
        except NotAdmitted as error:
            self._reporter.rejected("call", error.peer, str(error), error.why)
            self._deny(secure)
        except BadCertificate as error:
            why = Why.EXPIRED if isinstance(error, ExpiredCertificate) else Why.IDENTITY
            self._reporter.rejected("call", ip, str(error), why)
            self._deny(secure)
        except ssl.SSLError as error:
            reason = f"its TLS handshake failed: {error}"
            self._reporter.rejected("handshake", "at the bulk port", reason, classify(str(error)))
        except (TimeoutError, Broken) as error:
            reason = f"its TLS handshake failed: {error}"
            self._reporter.rejected("handshake", "at the bulk port", reason, Why.PROTOCOL)
        else:
            return connection
        return None

    def _enter(self, connection: Connection) -> bool:
        key, limits, evicted = connection.certificate.node_key, self._limits, None
        with self._lock:
            own = [other for other in self._members if other.certificate.node_key == key]
            full = own if len(own) >= limits.connections_per_peer else self._members
            if len(own) >= limits.connections_per_peer or len(self._members) >= limits.connections:
                evicted = min(
                    (other for other in full if other.idle_since is not None),
                    key=lambda other: other.idle_since or 0.0,
                    default=None,
                )
                if evicted is None:
                    self._reporter.rejected("connection", key, "too many bulk connections at a time", Why.TOO_MANY)
                    return False
                self._members.remove(evicted)
            self._members.append(connection)
        if evicted is not None:
            evicted.secure.end()
        return True

    def _leave(self, connection: Connection) -> None:
        with self._lock:
            if connection in self._members:
                self._members.remove(connection)

    def _answer_all(self, connection: Connection) -> None:
        secure, limits = connection.secure, self._limits
        first = memoryview(bytearray(1))
        try:
            while True:
                connection.idle_since = time.monotonic()
                secure.patience(limits.idle_seconds)
                secure.fill(first)
                connection.idle_since = None
                secure.patience(limits.request_seconds, limits.request_seconds)
                request = frames.read_request(_After(first, secure))
                secure.patience(limits.stall_seconds)
                if not self._answer(connection, request):
                    return
        except Broken as error:
            log.debug("a bulk connection of %s ended: %s", connection.where, error)
        except frames.BadFrame as error:
            self._reporter.rejected("call", connection.certificate.node_key, str(error), Why.MALFORMED)

    def _answer(self, connection: Connection, request: bytes) -> bool:
        """Answer one request. Returns whether to go on with the next. Raises Broken."""
        secure = connection.secure
        try:
            key = self._guard.member(connection.certificate.pem, connection.where)
            with self._guard.call(key):
                self._send(connection, key, request)
        except NotAdmitted as error:
            self._reporter.rejected("call", error.peer, str(error), error.why)
            if error.why is not Why.TOO_MANY:
                self._deny(secure)
                return False
            secure.send(frames.end_frame(Status.EXHAUSTED, str(error)))
        except Refused as refused:
            secure.send(frames.end_frame(refused.status, str(refused)))
            return refused.status is not Status.INVALID
        return True

    def _send(self, connection: Connection, key: bytes, request: bytes) -> None:
        secure, until = connection.secure, time.monotonic() + MAX_DEADLINE_SECONDS
        sending = self._pieces.open(key, request, secure.end, bulk=True)
        try:
            for piece in sending.pieces():
                if time.monotonic() > until:
                    raise Broken(f"a request takes more than {MAX_DEADLINE_SECONDS:.0f} s")
                secure.send(frames.piece_header(piece), piece)
        finally:
            sending.close()
        secure.send(frames.end_frame(Status.OK))

    @staticmethod
    def _deny(secure: Secure) -> None:
        with contextlib.suppress(Broken):
            secure.patience(1.0)
            secure.send(frames.end_frame(Status.DENIED, "only members of the run, by their node key over TLS 1.3"))


class _After:
    """A source whose first byte has been read."""

    def __init__(self, first: memoryview, rest: frames.Source) -> None:
        self._first, self._rest = first, rest

    def fill(self, view: memoryview) -> None:
        head = min(len(view), len(self._first))
        view[:head], self._first = self._first[:head], self._first[head:]
        if head < len(view):
            self._rest.fill(view[head:])
