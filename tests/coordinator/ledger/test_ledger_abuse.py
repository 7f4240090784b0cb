"""What no client should send: the ledger refuses it, bounds it, and goes on."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys

import pytest
from ledger_process import Ledger, start_ledger
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

REQUEST = b'{"jsonrpc":"2.0","id":1,"method":"getHealth"}'


def exchange(ledger: Ledger, sent: bytes, *, half_close: bool = True) -> bytes:
    """Everything that comes back until the ledger closes."""
    with socket.create_connection(("127.0.0.1", ledger.port), timeout=90) as connection:
        received = bytearray()
        try:
            connection.sendall(sent)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        except (ConnectionResetError, BrokenPipeError):
            pass
        return bytes(received)


def http(body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    lines = [f"{method} / HTTP/1.1", "host: x", f"content-length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def assert_alive(ledger: Ledger) -> None:
    assert b'"result":"ok"' in exchange(ledger, http(REQUEST, "connection: close"))


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\r\n\r\n", b""),
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"405"),
        (b"DELETE / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n", b"200"),
        (b"OPTIONS / HTTP/1.1\r\nconnection: close\r\n\r\n", b"204"),
        (b"POST / HTTP/9.9\r\n\r\n", b"505"),
        (b"POST / HTTP/1.1\r\nbroken header\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", b"400"),
        (http(b"", length=-1), b"400"),
        (b"POST / HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 400 + b"\r\n\r\n", b"400"),
        (http(b"x", length=10**9), b"413"),
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1\r\nx: " + b"y" * 20_000, b"431"),
        (b"POST / HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n", b"431"),
    ],
)
def test_malformed_http(ledger: Ledger, sent: bytes, status: bytes) -> None:
    answer = exchange(ledger, sent)
    assert answer[9:12] == status
    assert_alive(ledger)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe\x00", -32700),
        (b"[" * 200_000, -32700),
        (b'{"a":' * 50_000, -32700),
        (b"9" * 10_000, -32700),
        (b"null", -32600),
        (b"{}", -32600),
        (b'{"method":7}', -32600),
        (b'{"method":"getSlot","params":{"a":1}}', -32602),
        (b'{"method":"getSlot","id":{"a":1}}', None),
    ],
)
def test_malformed_json(ledger: Ledger, body: bytes, code: int | None) -> None:
    answer = json.loads(exchange(ledger, http(body, "connection: close")).partition(b"\r\n\r\n")[2])
    assert answer.get("error", {}).get("code") == code
    assert_alive(ledger)


def test_random_bytes(ledger: Ledger) -> None:
    chance = random.Random(7)
    for _ in range(40):
        exchange(ledger, chance.randbytes(chance.randrange(1, 3000)))
        exchange(ledger, http(chance.randbytes(chance.randrange(1, 300)), "connection: close"))
    assert_alive(ledger)


def test_pipelined_requests_are_answered_in_order(ledger: Ledger) -> None:
    wanted = [json.dumps({"jsonrpc": "2.0", "id": i, "method": "getHealth"}).encode() for i in range(200)]
    answer = exchange(ledger, b"".join(http(body) for body in wanted[:-1]) + http(wanted[-1], "connection: close"))
    found = [json.loads(part.partition(b"\r\n\r\n")[2])["id"] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert found == list(range(200))


def test_a_request_in_many_pieces(ledger: Ledger) -> None:
    whole = http(REQUEST, "connection: close")
    with socket.create_connection(("127.0.0.1", ledger.port), timeout=90) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(len(whole)):
            connection.sendall(whole[index : index + 1])
        assert b'"result":"ok"' in connection.makefile("rb").read()


def test_malformed_websocket_messages(ledger: Ledger) -> None:
    async def run() -> None:
        async with connect(ledger.ws) as socket_:
            for sent, code in (
                ("{", -32700),
                ("[" * 60_000, -32700),
                ("7", -32600),
                ('{"id":1,"method":"getSlot"}', -32601),
                ('{"id":1,"method":"accountSubscribe","params":["x"]}', -32602),
                ('{"id":1,"method":"accountSubscribe","params":[]}', -32602),
                ('{"id":1,"method":"logsSubscribe","params":[{"mentions":[]}]}', -32602),
                ('{"id":1,"method":"slotUnsubscribe","params":[99999999]}', -32602),
                ('{"id":1,"method":"slotUnsubscribe","params":["x"]}', -32602),
            ):
                await socket_.send(sent)
                answer = json.loads(await asyncio.wait_for(socket_.recv(), 90))
                assert answer["error"]["code"] == code, sent[:80]
            await socket_.send("x" * 100_000)
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(socket_.recv(), 90)
        with socket.create_connection(("127.0.0.1", ledger.port + 1), timeout=90) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            plain.recv(1000)

    asyncio.run(run())
    assert_alive(ledger)


def test_subscriptions_are_bounded(ledger: Ledger) -> None:
    async def run() -> None:
        async with connect(ledger.ws) as socket_:
            body = json.dumps({"id": 1, "method": "slotSubscribe"})
            for _ in range(1024):
                await socket_.send(
                    json.dumps({"id": 1, "method": "logsSubscribe", "params": [{"mentions": ["1" * 32]}]})
                )
                assert "result" in json.loads(await socket_.recv())
            await socket_.send(body)
            assert "at most 1024" in json.loads(await socket_.recv())["error"]["message"]

    asyncio.run(run())


# ---------------------------------------------------------------------- the process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(number: signal.Signals) -> None:
    process = start_ledger("--port", "0")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    with socket.create_connection(("127.0.0.1", int(ready["rpc"].rpartition(":")[2]))):
        process.send_signal(number)
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 0
    assert output == ""
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "arguments", [["--port", "70000"], ["--port", "-1"], ["--port", "x"], ["--slot-ms", "0"], ["--snapshot-every", "1"]]
)
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "coordinator.ledger", "run", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 2
    assert arguments[0] in result.stderr


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_in_use_is_named(ledger: Ledger, taken: int) -> None:
    port = ledger.port + taken
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", str(port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 3
    assert str(port) in result.stderr
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_host_that_does_not_resolve_is_named() -> None:
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0", "--host", "no.such.host.invalid"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 3
    assert "no.such.host.invalid" in result.stderr
    assert "Traceback" not in result.stderr
