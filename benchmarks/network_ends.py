"""The ends that `benchmarks.network` measures, processes of their own: plain sockets, TLS, and the network process.

python -m benchmarks.network_ends serve raw|tls             prints its port, serves until standard input ends
python -m benchmarks.network_ends fetch raw|tls HOST PORT   a line of standard input is a number of bytes to fetch, and
                                                            is answered by the seconds it took
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from psyche_node.identity import NodeKey, load_or_create_node_key
from psyche_node.ipc import Message, Ok
from psyche_node.network.certificates import issue, null_ca_pem
from psyche_node.network.messages import (
    Configure,
    Fetched,
    FetchFailed,
    Forget,
    MemberEntry,
    Publish,
    Ready,
    SetMembers,
    Want,
    WantEntry,
)
from psyche_node.network.store import BlobStore
from psyche_node.node.processes import Child

CHUNK = 1 << 20
PATIENCE = 300.0
_REQUEST = struct.Struct("<Q")


# Plain sockets and TLS ------------------------------------------------------------------------------------------------


def tls_context(server: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides, as the exchange has, checked against the CA that issued them."""
    leaf = issue(NodeKey.generate())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=null_ca_pem().decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(leaf.certificate + leaf.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def serve(kind: str) -> None:
    context = tls_context(True) if kind == "tls" else None
    block = memoryview(os.urandom(CHUNK))

    def answer(connection: Any) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        with connection:
            while len(request := connection.recv(_REQUEST.size)) == _REQUEST.size:
                (left,) = _REQUEST.unpack(request)
                while left:
                    count = min(left, CHUNK)
                    connection.sendall(block[:count])
                    left -= count

    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def fetch(kind: str, host: str, port: int) -> None:
    connection: Any = socket.create_connection((host, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "tls":
        connection = tls_context(False).wrap_socket(connection)
    buffer = bytearray(CHUNK)
    print("ready", flush=True)
    for line in sys.stdin:
        left = int(line)
        started = time.perf_counter()
        connection.sendall(_REQUEST.pack(left))
        while left:
            count = connection.recv_into(buffer, min(left, CHUNK))
            if not count:
                raise SystemExit("the server closed the connection")
            left -= count
        print(time.perf_counter() - started, flush=True)


class SocketServer:
    """A server of raw or TLS bytes."""

    def __init__(self, kind: str) -> None:
        self._process = _ends("serve", kind)
        self.port = int(_line(self._process))

    def stop(self) -> None:
        self._process.communicate(timeout=10)


class SocketClient:
    """A client with one warm connection."""

    def __init__(self, kind: str, port: int) -> None:
        self._process = _ends("fetch", kind, "127.0.0.1", str(port))

    async def ready(self) -> None:
        await asyncio.to_thread(_line, self._process)

    async def fetch(self, size: int) -> float:
        """Fetch ``size`` bytes; return the seconds it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return float(await asyncio.to_thread(_line, self._process))

    async def stop(self) -> None:
        await asyncio.to_thread(self._process.communicate, timeout=10)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _ends(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.network_ends", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"an end of the benchmark has died (exit status {process.wait()})")
    return line


# The exchange ---------------------------------------------------------------------------------------------------------


class Node:
    """A node's network process, spoken to as its supervisor does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.key = load_or_create_node_key(folder / "node.key")
        self.store = BlobStore(folder / "blobs")
        self.failures: list[str] = []
        self._fetched: dict[int, asyncio.Future[float]] = {}
        self._round = 0

    async def start(self, bootstrap: list[str], announced: dict[str, str | int] | None = None) -> Ready:
        """``announced``: further fields of Configure, about ports and where others reach them."""
        self._child = await Child.start("network", "psyche_node.network", self._on_event)
        return await self._child.endpoint.call(
            Configure(
                folder=str(self.folder),
                node_key_path=str(self.folder / "node.key"),
                bootstrap=bootstrap,
                run=bytes(32).hex(),
                **(announced or {}),
            ),
            Ready,
        )

    async def meet(self, nodes: list[Node]) -> None:
        """Make ``nodes`` the members of the run, in slot order."""
        entries = [MemberEntry(slot=slot, node_key=node.key.public.hex()) for slot, node in enumerate(nodes)]
        await self._child.endpoint.call(SetMembers(members=entries), Ok)

    async def fetch(self, digest: bytes, size: int) -> float:
        """Fetch a blob of member 0, verified and written under its name; return the seconds it took."""
        self._round += 1
        future = self._fetched[self._round] = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        want = Want(round=self._round, wants=[WantEntry(member=0, digest=digest.hex(), length=size)])
        await self._child.endpoint.call(want, Ok)
        async with asyncio.timeout(PATIENCE):
            return await future - started

    async def publish(self, size: int) -> bytes:
        """Put a new blob of ``size`` bytes into the store and announce it; return its digest."""
        self._round += 1
        digest, _ = await asyncio.to_thread(lambda: self.store.put(os.urandom(size), self._round))
        await self._child.endpoint.call(Publish(round=self._round, member=0, digest=digest.hex(), length=size), Ok)
        return digest

    async def forget(self) -> None:
        """Drop all blobs."""
        await self._child.endpoint.call(Forget(before_round=self._round + 1), Ok)

    async def stop(self) -> None:
        await self._child.stop()

    def _on_event(self, message: Message) -> None:
        if isinstance(message, Fetched):
            self._fetched.pop(message.round).set_result(time.perf_counter())
        elif isinstance(message, FetchFailed):
            self.failures.append(message.reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    fetching = commands.add_parser("fetch")
    for command in (serving, fetching):
        command.add_argument("kind", choices=("raw", "tls"))
    fetching.add_argument("host")
    fetching.add_argument("port", type=int)
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.kind)
    else:
        fetch(options.kind, options.host, options.port)


if __name__ == "__main__":
    main()
