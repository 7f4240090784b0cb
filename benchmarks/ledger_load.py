"""The load of `benchmarks.ledger`, a process of its own: signed payments over keep-alive connections.

python -m benchmarks.ledger_load RPC --count 20000 --connections 32 [--rate 1500] [--skip-preflight]

Signs everything first. Without --rate every connection sends its next transaction as soon as the last is answered;
with it transactions are due at fixed times, and a late answer counts from when its request was due. Prints one JSON
line: answers per second, latencies in ms, and how many answers were errors.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
import urllib.request
from collections import deque
from typing import Any

from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import Message
from solders.system_program import TransferParams, transfer
from solders.transaction import Transaction

PAYERS = 64
RECIPIENTS = 1024
SOL = 10**9


def call(rpc: str, method: str, *params: object) -> Any:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = urllib.request.Request(rpc, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())["result"]


def signed_requests(rpc: str, count: int, skip_preflight: bool) -> list[bytes]:
    """Whole HTTP requests, each with a payment of its own."""
    payers = [Keypair() for _ in range(PAYERS)]
    recipients = [Keypair().pubkey() for _ in range(RECIPIENTS)]
    for payer in payers:
        call(rpc, "requestAirdrop", str(payer.pubkey()), 10_000 * SOL)
    at = Hash.from_string(call(rpc, "getLatestBlockhash")["value"]["blockhash"])
    options = json.dumps({"encoding": "base64", "skipPreflight": skip_preflight})
    requests = []
    for number in range(count):
        payer = payers[number % PAYERS]
        pay = transfer(
            TransferParams(
                from_pubkey=payer.pubkey(), to_pubkey=recipients[number % RECIPIENTS], lamports=1_000_000 + number
            )
        )
        wire = bytes(Transaction([payer], Message.new_with_blockhash([pay], payer.pubkey(), at), at))
        text = base64.b64encode(wire).decode()
        body = f'{{"jsonrpc":"2.0","id":{number},"method":"sendTransaction","params":["{text}",{options}]}}'.encode()
        head = (
            f"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        )
        requests.append(head.encode() + b"\r\n" + body)
    return requests


class Load:
    """What is left to send, and what came back."""

    def __init__(self, requests: list[bytes], rate: float | None) -> None:
        self.requests = deque(enumerate(requests))
        self.total = len(requests)
        self.rate = rate
        self.latencies: list[float] = []
        self.errors = 0
        self.done = asyncio.Event()
        self.started = time.perf_counter()
        self.idle: deque[Connection] = deque()

    def due(self, number: int) -> float:
        return self.started if self.rate is None else self.started + number / self.rate

    def answered(self, connection: Connection, since: float, failed: bool) -> None:
        self.latencies.append(time.perf_counter() - since)
        self.errors += failed
        if len(self.latencies) == self.total:
            self.done.set()
        elif self.rate is None:
            self.send_next(connection)
        else:
            self.idle.append(connection)
            self.pump()

    def send_next(self, connection: Connection) -> None:
        if self.requests:
            number, request = self.requests.popleft()
            connection.send(request, time.perf_counter() if self.rate is None else self.due(number))

    def pump(self) -> None:
        """Send everything that is due and that a connection is free for."""
        now = time.perf_counter()
        while self.requests and self.idle and self.due(self.requests[0][0]) <= now:
            self.send_next(self.idle.popleft())


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.buffer = b""
        self.since = 0.0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.load.done.is_set():
            raise SystemExit(f"the ledger closed a connection: {exc}")

    def send(self, request: bytes, since: float) -> None:
        assert self.transport is not None
        self.since = since
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            failed = b'"result":"' not in body or not head.startswith(b"HTTP/1.1 200")
            self.buffer = b""
            self.load.answered(self, self.since, failed)


async def run(rpc: str, requests: list[bytes], connections: int, rate: float | None) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    load = Load(requests, rate)
    host, _, port = rpc.removeprefix("http://").rpartition(":")
    opened = [(await loop.create_connection(lambda: Connection(load), host, int(port)))[1] for _ in range(connections)]
    load.started = time.perf_counter()
    if rate is None:
        for connection in opened:
            load.send_next(connection)
    else:
        load.idle.extend(opened)
        while load.requests:
            load.pump()
            await asyncio.sleep(0.0005)
    await load.done.wait()
    seconds = time.perf_counter() - load.started
    latencies = sorted(load.latencies)

    def percentile(share: float) -> float:
        return latencies[min(len(latencies) - 1, int(share * len(latencies)))] * 1000

    return {
        "transactions": load.total,
        "errors": load.errors,
        "per_second": load.total / seconds,
        "p50_ms": percentile(0.5),
        "p99_ms": percentile(0.99),
        "max_ms": latencies[-1] * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rpc")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--skip-preflight", action="store_true")
    options = parser.parse_args()
    requests = signed_requests(options.rpc, options.count, options.skip_preflight)
    print(json.dumps(asyncio.run(run(options.rpc, requests, options.connections, options.rate))))


if __name__ == "__main__":
    main()
