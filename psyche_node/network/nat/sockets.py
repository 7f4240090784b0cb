"""Sockets of the NAT ladder: Unix sockets in the node's folder, TCP sockets bound to a chosen port, the punch."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import math
import os
import select
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import unquote

from psyche_node.network.statements import Malformed, join_address, split_address

# sockaddr_un holds 108 bytes with the final zero.
_MAX_UNIX_PATH = 107
# After a refusal the next try; the other side's first packet has opened its NAT by then, or one of those after that.
# No more than these, or a punch at an address where nobody expects one would be a small flood.
_RETRY_SECONDS = (0.1, 0.2, 0.4, 0.8, 1.6)
# A peer whose NAT forgot the connection is noticed within 15 + 3 * 5 s; the probes also keep the NAT's entry alive.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}


class SocketFolder:
    """A folder for Unix sockets that only this user can enter, emptied at the start."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._folder = folder
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._names = itertools.count()

    def path(self, name: str) -> str:
        """Return a path for a socket called ``name`` that fits a socket address, in this process."""
        path = str(self._folder / name)
        # The detour over the open folder is short, wherever the folder is.
        return path if len(os.fsencode(path)) <= _MAX_UNIX_PATH else f"/proc/self/fd/{self._descriptor}/{name}"

    def name(self) -> str:
        """Return a name that no other socket had."""
        return str(next(self._names))

    def close(self) -> None:
        """Remove the folder and what is left in it."""
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._descriptor)


def connect(address: str, seconds: float) -> socket.socket:
    """Connect to ``address`` from a fresh port that ``punch`` can use again. Raises OSError."""
    connection = _bound(address, 0)
    try:
        connection.settimeout(seconds)
        connection.connect(split_address(address))
        return _tuned(connection)
    except OSError:
        connection.close()
        raise


def punch(port: int, address: str, seconds: float) -> socket.socket:
    """Connect local ``port`` to ``address`` while the other side does the same. Raises OSError when that fails.

    Each side's first packet opens its own NAT for the other's. One that comes too early is lost, and sent again by
    the kernel after a second; one that is refused is sent again here, a few times. Where no NAT is in the way, the
    other one's packet may come while this one sends none, so the port is listened on as well: for the IP address of
    ``address``.
    """
    deadline = time.monotonic() + seconds
    reason: OSError = TimeoutError(f"nothing came from {address} within {seconds:.0f} s")
    retry_at, pauses, waiting = 0.0, iter(_RETRY_SECONDS), select.poll()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bound(address, port))
        listener.setblocking(False)
        listener.listen(4)
        waiting.register(listener, select.POLLIN)
        calling: socket.socket | None = None
        try:
            while (now := time.monotonic()) < deadline:
                if calling is None and now >= retry_at:
                    try:
                        calling = _begun(address, port)
                        waiting.register(calling, select.POLLOUT)
                    except OSError as error:
                        reason, retry_at = error, now + next(pauses, math.inf)
                until = deadline if calling is not None else min(deadline, retry_at)
                for descriptor, _ in waiting.poll(max(1, int(1000 * (until - now)))):
                    if descriptor == listener.fileno():
                        if (caller := _accept(listener, address)) is not None:
                            return _tuned(caller)
                    elif calling is not None:
                        code = calling.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                        waiting.unregister(calling)
                        connected, calling = calling, None
                        if not code:
                            return _tuned(connected)
                        connected.close()
                        reason = OSError(code, os.strerror(code))
                        retry_at = time.monotonic() + next(pauses, math.inf)
            raise reason
        finally:
            if calling is not None:
                calling.close()


def _begun(address: str, port: int) -> socket.socket:
    """Return a socket that connects to ``address``. Raises OSError when that fails at once: nothing is on its way."""
    calling = _bound(address, port)
    calling.setblocking(False)
    code = calling.connect_ex(split_address(address))
    if code not in (0, errno.EINPROGRESS):
        # The socket itself would say neither so nor why, as without a route.
        calling.close()
        raise OSError(code, os.strerror(code))
    return calling


def _accept(listener: socket.socket, address: str) -> socket.socket | None:
    try:
        caller, where = listener.accept()
    except OSError:
        return None
    if where[0] == split_address(address)[0]:
        return caller
    caller.close()
    return None


def local_port(connection: socket.socket) -> int:
    return int(connection.getsockname()[1])


def peer_address(context_peer: str) -> str | None:
    """Return the IP:port that gRPC's ``context.peer()`` names, or None when the call came over no network."""
    kind, _, rest = context_peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    try:
        ip, port = split_address(unquote(rest))
    except Malformed:
        return None
    mapped = getattr(ipaddress.ip_address(ip), "ipv4_mapped", None)
    return join_address(str(mapped or ip), port)


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Both, on both sockets of a port: what a connected socket of another process may share differs by system.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    except OSError:
        made.close()
        raise
    return made


def _tuned(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
