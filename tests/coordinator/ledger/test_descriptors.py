"""Idle connections never take the descriptors that the log needs."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_process import Ledger, call

SNAPSHOT_EVERY = 100


@contextlib.contextmanager
def limited(soft: int, hard: int, folder: Path) -> Iterator[Ledger]:
    """A ledger that was started with these limits of open files, and begins a new file of its log often."""
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "from coordinator.ledger.cli import main; main()"
    )
    arguments = ["run", "--port", "0", "--slot-ms", "5", "--snapshot-every", str(SNAPSHOT_EVERY), "--dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        yield Ledger(ready["rpc"], ready["ws"], process)
    finally:
        process.terminate()
        process.communicate(timeout=90)
    assert process.returncode == 0


def slot_over(kept: socket.socket) -> int:
    """The slot, asked for on a connection that was there before."""
    body = b'{"id":1,"method":"getSlot"}'
    kept.sendall(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    received = b""
    while b'"id":1}' not in received:
        part = kept.recv(65536)
        assert part, "the ledger closed the connection"
        received += part
    return int(json.loads(received.partition(b"\r\n\r\n")[2])["result"])


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.001)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("port", ["http", "websocket", "both"])
def test_idle_connections_do_not_stop_the_log(tmp_path: Path, port: str) -> None:
    with limited(256, 256, tmp_path / "ledger") as ledger, contextlib.ExitStack() as stack:
        ports = {"http": [ledger.port], "websocket": [ledger.port + 1], "both": [ledger.port, ledger.port + 1]}[port]
        kept = stack.enter_context(socket.create_connection(("127.0.0.1", ledger.port), timeout=90))
        start = slot_over(kept)
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", ports[index % len(ports)]), timeout=90))
            for index in range(400)
        ]
        now = start
        while now < start + 6 * SNAPSHOT_EVERY:  # each is a new file of the log and a snapshot
            now = slot_over(kept)
        assert ledger.process.poll() is None
        still_open = sum(is_open(one) for one in idle)
        assert 64 < still_open < 256 - 64


def test_the_soft_limit_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    with limited(96, 2048, tmp_path / "ledger") as ledger, contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", ledger.port), timeout=90)) for _ in range(300)
        ]
        assert call(ledger, "getHealth")["result"] == "ok"
        assert all(is_open(one) for one in idle)
