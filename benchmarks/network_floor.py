"""What a byte costs at the least on its way from disk to disk: `python -m benchmarks.network_floor` (half a minute).

CPU seconds per GB of each thing that an exchange has to do, one after the other in one process and with nothing else in
the caches: TLS's sealing and opening by Python's `ssl`, plain TCP over loopback (both ends), reading a blob from the
page cache, its BLAKE3 digests, and writing it to a new file. TLS's own share of the sum is what an exchange could reach
of TLS's rate on busy cores if it cost nothing else.
"""

from __future__ import annotations

import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from benchmarks.network_ends import tls_context
from psyche_node.network.blobs import PIECE_BYTES, piece_digest

PIECES = 64
REPEAT = 9
PIECE = os.urandom(PIECE_BYTES)


def seconds_per_gb(work: Callable[[], object]) -> float:
    """CPU seconds of this process, the median of a few rounds; ``work`` is done once for each piece."""
    rounds = []
    for _ in range(REPEAT):
        started = time.process_time()
        for _ in range(PIECES):
            work()
        rounds.append((time.process_time() - started) / (PIECES * PIECE_BYTES / 1e9))
    return statistics.median(rounds)


def tls_in_memory() -> Callable[[], object]:
    """Seal a piece and open it again, as two ends that share a buffer do."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = tls_context(True).wrap_bio(to_server, to_client, server_side=True)
    client = tls_context(False).wrap_bio(to_client, to_server)
    for side in (client, server) * 4:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    buffer = memoryview(bytearray(PIECE_BYTES))

    def work() -> None:
        server.write(PIECE)
        at = 0
        while at < PIECE_BYTES:
            at += int(client.read(PIECE_BYTES - at, buffer[at:]))

    return work


def tcp() -> Callable[[], object]:
    """Send a piece and receive it, by two threads."""
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver = listener.accept()[0]
    go = threading.Semaphore(0)
    buffer = memoryview(bytearray(PIECE_BYTES))

    def send() -> None:
        while go.acquire():
            sender.sendall(PIECE)

    threading.Thread(target=send, daemon=True).start()

    def work() -> None:
        go.release()
        left = PIECE_BYTES
        while left:
            left -= receiver.recv_into(buffer, left)

    return work


def files(folder: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Write a piece to a new file (one for each round), and read one from the page cache."""
    names = (os.path.join(folder, str(number)) for number in range(1 << 30))

    def written() -> Iterator[None]:
        for name in names:
            with open(name, "wb", buffering=0) as file:
                for _ in range(PIECES):
                    file.write(PIECE)
                    yield

    writing = written()
    whole = os.path.join(folder, "whole")
    with open(whole, "wb") as file:
        file.write(PIECE * PIECES)
    reading = open(whole, "rb", buffering=0)  # noqa: SIM115

    def read() -> None:
        if not reading.read(PIECE_BYTES):
            reading.seek(0)

    return lambda: next(writing), read


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write, read = files(folder)
        costs = {
            "TLS: seal and open": seconds_per_gb(tls_in_memory()),
            "TCP: both ends": seconds_per_gb(tcp()),
            "read from the page cache": seconds_per_gb(read),
            "BLAKE3": seconds_per_gb(lambda: piece_digest(PIECE)),
            "write a new file": seconds_per_gb(write),
        }
    for name, cost in costs.items():
        print(f"{name:<28}{cost:>8.2f} s/GB")
    tls, total = sum(list(costs.values())[:2]), sum(costs.values())
    print(f"{'TLS over TCP':<28}{tls:>8.2f} s/GB")
    print(f"{'all of it':<28}{total:>8.2f} s/GB, so at most {tls / total:.0%} of the rate of TLS alone")


if __name__ == "__main__":
    main()
