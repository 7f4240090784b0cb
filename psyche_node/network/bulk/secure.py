"""TLS over a TCP socket, in large steps: a few system calls per MiB, where ``ssl.SSLSocket`` makes two per 16 KiB.

TLS works between two buffers in memory (``ssl.MemoryBIO``), and what is in them travels in steps of up to 1 MiB.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from psyche_node.network.bulk.frames import ALPN
from psyche_node.network.certificates import BadCertificate, Leaf, PeerCertificate, identify, null_ca_pem
from psyche_node.network.links import show

# A step of sending is a piece; both are one buffer of TLS's and one of Python's. Smaller steps cost CPU time.
SEND_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 19
_SMALL = 4096
# What TLS itself wants to say (alerts, key updates) while this side only reads.
_MAX_UNSENT = 65536


class Broken(Exception):
    """The connection is of no use any more; the message says why."""


class Contexts:
    """What connections are made with, for the certificate that is shown just now. Any thread."""

    def __init__(self, leaf: Callable[[], Leaf], make: Callable[[Leaf], ssl.SSLContext]) -> None:
        """``leaf`` is asked each time; ``make`` is ``server_context`` or ``client_context``."""
        self._leaf, self._make = leaf, make
        self._made: tuple[Leaf, ssl.SSLContext] | None = None

    def current(self) -> ssl.SSLContext:
        leaf, made = self._leaf(), self._made
        if made is None or made[0] is not leaf:
            self._made = made = (leaf, self._make(leaf))
        return made[1]


def server_context(own: Leaf) -> ssl.SSLContext:
    """Return what a server needs that shows ``own`` and asks for a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # It proves nothing, as in gRPC; who it is says the certificate's libp2p extension.
    context.load_verify_locations(cadata=null_ca_pem().decode())
    # A session that is taken up again would bring its old certificate, and a ticket be bytes that nobody waits for.
    context.num_tickets = 0
    return _common(context, own)


def client_context(own: Leaf) -> ssl.SSLContext:
    """Return what a client needs that shows ``own``. Whose certificate the server shows is to be looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # TLS makes the server show that it holds the key of its certificate, whatever this says.
    context.verify_mode = ssl.CERT_NONE
    return _common(context, own)


def _common(context: ssl.SSLContext, own: Leaf) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    show(context, own)
    return context


class Secure:
    """A TLS connection over ``sock``, which it owns. One thread uses it; ``end`` may be called from any."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._buffer: memoryview | None = None
        self._small = memoryview(bytearray(_SMALL))
        self._lock = threading.Lock()
        self._closed = self.ended = False
        self._until: float | None = None

    def handshake(self, seconds: float) -> None:
        """Raises ssl.SSLError, OSError (TimeoutError after ``seconds``) or Broken."""
        until = time.monotonic() + seconds
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    left = until - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(f"it did not end within {seconds:.0f} s") from None
                    self._sock.settimeout(left)
                    self._receive(self._small)
            self._flush()
        except ssl.SSLError:
            # The alert says to the other side what was wrong.
            with contextlib.suppress(OSError, Broken):
                self._flush()
            raise
        if self._tls.selected_alpn_protocol() != ALPN:
            raise Broken(f"it speaks {self._tls.selected_alpn_protocol()}, not {ALPN}")

    def certificate(self) -> PeerCertificate:
        """Return whose the other side's certificate is. Raises BadCertificate."""
        der = self._tls.getpeercert(binary_form=True)
        if der is None:
            raise BadCertificate("it shows no certificate")
        return identify(ssl.DER_cert_to_PEM_cert(der).encode())

    def patience(self, seconds: float, total: float | None = None) -> None:
        """Let no step of sending or receiving take longer than ``seconds``, nor all receiving longer than ``total``."""
        self._until = None if total is None else time.monotonic() + total
        with self._lock:
            if not self._closed:
                self._sock.settimeout(seconds)

    def send(self, *parts: bytes) -> None:
        """Send it all. Raises Broken."""
        try:
            for part in parts:
                view = memoryview(part)
                for at in range(0, len(view), SEND_BYTES):
                    self._tls.write(view[at : at + SEND_BYTES])
                    if self._outgoing.pending >= SEND_BYTES:
                        self._flush()
            self._flush()
        except OSError as error:
            raise Broken(f"nothing can be sent: {error}") from None

    def fill(self, view: memoryview) -> None:
        """Read exactly as many bytes as ``view`` has. Raises Broken."""
        read, at, size = self._tls.read, 0, len(view)
        buffer = self._small if size <= _SMALL and self._buffer is None else self._large()
        try:
            while at < size:
                try:
                    count = int(read(size - at, view[at:]))  # with a buffer it returns a number
                except ssl.SSLWantReadError:
                    self._receive(buffer)
                    continue
                if not count:
                    raise Broken("the other side closed it")
                at += count
        except OSError as error:
            raise Broken(f"nothing comes: {error}") from None

    def quiet(self) -> bool:
        """Return whether there is nothing to read, not even an end."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLIN)
            return not self.ended and not self._incoming.pending and not poll.poll(0)
        except (OSError, ValueError):
            return False

    def rest(self) -> None:
        """Give the large buffer back, until it is read from again."""
        self._buffer = None

    def end(self) -> None:
        """End the connection: whoever sends or receives gets Broken. Any thread."""
        with self._lock:
            self.ended = True
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free what it holds."""
        with self._lock:
            self._closed = self.ended = True
            self._sock.close()
        self._buffer = None

    def _large(self) -> memoryview:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        return self._buffer

    def _receive(self, buffer: memoryview) -> None:
        if self._outgoing.pending > _MAX_UNSENT:
            raise Broken("it makes this side say more than it reads")
        if self._until is not None and time.monotonic() > self._until:
            raise Broken("it takes too long")
        count = self._sock.recv_into(buffer)
        if not count:
            raise Broken("the other side closed it")
        self._incoming.write(buffer[:count])

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._sock.sendall(self._outgoing.read())
