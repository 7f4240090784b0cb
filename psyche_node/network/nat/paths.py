"""Punched paths: TCP connections through two NATs, each with a Unix socket that leads there. Any thread.

Whoever is on the other end has to show the certificate that the node's signed record names, in the TLS handshake that
runs through the path. Paths that nobody uses are closed.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

import trio

from psyche_node.network.certificates import PeerCertificate
from psyche_node.network.nat.sockets import SocketFolder
from psyche_node.network.nat.splice import Door, Splice

# Paths that this node opened, and as many that others opened to it.
MAX_PATHS = 16
IDLE_SECONDS = 150.0
# The socket of this node's own gRPC server, for those who come through a path.
SERVER_SOCKET = "grpc"


@dataclass(eq=False)
class Path:
    """One path that this node opened. ``target`` is what gRPC dials; ``certificate`` is whose it must be."""

    certificate: PeerCertificate
    door: Door

    @property
    def target(self) -> str:
        return self.door.target

    @property
    def alive(self) -> bool:
        return self.door.alive


class Paths:
    """The open paths, by peer."""

    def __init__(self, folder: SocketFolder) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._paths: dict[bytes, Path] = {}
        self._incoming: set[Splice] = set()
        self._wanted: Callable[[bytes], None] | None = None

    def on_wanted(self, wanted: Callable[[bytes], None]) -> None:
        """Have ``wanted(peer)`` called, in any thread, when a path is asked for and there is none."""
        self._wanted = wanted

    async def run(self) -> None:
        """Close what is idle, until cancelled; then everything."""
        try:
            while True:
                await trio.sleep(IDLE_SECONDS / 10)
                self._close_idle()
        finally:
            self.close()

    def path(self, peer: bytes, tls_leaf: bytes, *, ask: bool) -> Path | None:
        """Return the path to ``peer`` if there is one. Otherwise, and if ``ask``, one is wanted."""
        with self._lock:
            path = self._paths.get(peer)
            if path is not None:
                if path.alive and path.certificate.der_hash == tls_leaf:
                    return path
                path.door.close()
                del self._paths[peer]
        if ask and self._wanted is not None:
            self._wanted(peer)
        return None

    def add(self, peer: bytes, certificate: PeerCertificate, connection: socket.socket) -> None:
        """Make ``connection`` the path to ``peer``."""
        path = Path(certificate, Door(self.folder.path(self.folder.name()), connection, IDLE_SECONDS))
        with self._lock:
            before = self._paths.pop(peer, None)
            self._paths[peer] = path
        if before is not None:
            before.door.close()

    def add_incoming(self, connection: socket.socket) -> None:
        """Let a peer that came through the NATs talk to this node's gRPC server. Raises OSError if that is gone."""
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.connect(self.folder.path(SERVER_SOCKET))
        except OSError:
            server.close()
            connection.close()
            raise
        with self._lock:
            self._incoming = {splice for splice in self._incoming if splice.alive}
            self._incoming.add(Splice(connection, server))

    def full(self) -> bool:
        """Return whether this node has as many paths to others as it may have."""
        with self._lock:
            return sum(path.alive for path in self._paths.values()) >= MAX_PATHS

    def full_of_incoming(self) -> bool:
        with self._lock:
            return sum(splice.alive for splice in self._incoming) >= MAX_PATHS

    def has(self, peer: bytes) -> bool:
        path = self._paths.get(peer)
        return path is not None and path.alive

    def punched(self) -> set[bytes]:
        """Return the nodes that this node has a path to."""
        with self._lock:
            return {peer for peer, path in self._paths.items() if path.alive}

    def retain(self, peers: set[bytes]) -> None:
        """Close the paths to all other nodes."""
        with self._lock:
            gone = [self._paths.pop(peer) for peer in list(self._paths) if peer not in peers]
        for path in gone:
            path.door.close()

    def close(self) -> None:
        self.retain(set())
        with self._lock:
            incoming = list(self._incoming)
        for splice in incoming:
            splice.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle: list[Door | Splice] = [path.door for path in self._paths.values()]
            idle = [one for one in [*idle, *self._incoming] if one.idle_seconds > IDLE_SECONDS]
            self._paths = {peer: path for peer, path in self._paths.items() if path.door not in idle and path.alive}
            self._incoming = {splice for splice in self._incoming if splice not in idle and splice.alive}
        for one in idle:
            one.close()
