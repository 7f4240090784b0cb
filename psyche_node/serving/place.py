"""What a server takes before a large model is loaded for nothing: its address and its key. No torch is needed here."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from psyche_node.serving.errors import ServeError

_SHORTEST_KEY = 16


def bind(host: str, port: int) -> socket.socket:
    """Take an address; connections are refused until the model is loaded.

    Raises:
        ServeError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except (OSError, OverflowError) as error:
        raise ServeError(f"cannot listen on {host} port {port}: {error}. Choose another --host or --port") from None
    return taken


def read_key(path: Path) -> str:
    """Return the API key in a file of mode 0600.

    Raises:
        ServeError: others can read the file, or what it holds is no key.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ServeError(f"{path} has mode {mode:04o}: others can read the key. Run: chmod 600 {path}")
            key = file.read(4097).strip()
    except OSError as error:
        raise ServeError(f"the key file {path} cannot be read: {error.strerror}") from None
    if not _SHORTEST_KEY <= len(key) <= 4096 or not all(33 <= byte <= 126 for byte in key):
        raise ServeError(
            f"{path} holds no key: it must be one line of at least {_SHORTEST_KEY} letters and digits. "
            f"Make one: (umask 077; openssl rand -hex 32 > {path})"
        )
    return key.decode("ascii")
