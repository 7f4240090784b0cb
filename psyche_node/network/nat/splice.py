"""Splice proxies: gRPC takes an address, not a connection, so a punched connection gets a Unix socket as its address.

Bytes are copied as they are: TLS runs from end to end, and a proxy neither sees nor changes anything. A door lets one
connection through, because one is what there is behind it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

CHUNK_BYTES = 256 * 1024


class Splice:
    """Copies between two connected sockets, both ways, until one of them ends; then both are closed. Two threads."""

    def __init__(self, left: socket.socket, right: socket.socket) -> None:
        self._ends = (left, right)
        self._lock = threading.Lock()
        self._running = 2
        self._moved = time.monotonic()
        for end in self._ends:
            end.settimeout(None)
        for source, target in ((left, right), (right, left)):
            threading.Thread(target=self._pump, args=(source, target), name="splice", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._running == 2

    @property
    def idle_seconds(self) -> float:
        """How long no byte has been copied."""
        return time.monotonic() - self._moved

    def close(self) -> None:
        """End it; may be called several times and from any thread."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                target.sendall(buffer[:count])
                self._moved = time.monotonic()
        # HTTP/2 has no use for a connection that is closed in one direction.
        self.close()
        with self._lock:
            self._running -= 1
            last = not self._running
        if last:
            for end in self._ends:
                end.close()


class Door:
    """A Unix socket that leads one client to ``connection``."""

    def __init__(self, path: str, connection: socket.socket, patience: float) -> None:
        """Wait ``patience`` seconds for the client. Raises OSError, and closes ``connection``, if it cannot."""
        self.target = f"unix:{path}"
        self._path, self._connection = path, connection
        self._lock = threading.Lock()
        self._splice: Splice | None = None
        self._closed = False
        self._opened = time.monotonic()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(path)
            os.chmod(path, 0o600)
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            connection.close()
            raise
        self._listener.settimeout(patience)
        threading.Thread(target=self._wait, name="door", daemon=True).start()

    @property
    def alive(self) -> bool:
        splice = self._splice
        return not self._closed if splice is None else splice.alive

    @property
    def idle_seconds(self) -> float:
        splice = self._splice
        return time.monotonic() - self._opened if splice is None else splice.idle_seconds

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._splice is not None:
                self._splice.close()
        # Wakes the thread that waits, if one does; shutting a listening socket down would not.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
            knock.setblocking(False)
            knock.connect(self._path)

    def _wait(self) -> None:
        client: socket.socket | None = None
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with self._lock:
            if client is not None and not self._closed:
                self._splice = Splice(client, self._connection)
                return
            self._closed = True
        if client is not None:
            client.close()
        self._connection.close()
