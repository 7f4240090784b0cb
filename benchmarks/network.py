"""How fast updates travel: `python -m benchmarks.network` (five minutes; `--quick` takes half a minute).

Three parts, each with its baselines in the same run, interleaved, and as medians:

- *one*: one blob between two processes: plain TCP, TLS 1.3 by Python's `ssl` (both sides with certificates), and the
  exchange with all that belongs to it: node identities, the guard, each piece verified, and the blob on disk under its
  name. Every repetition has a blob of its own, published before.
- *fan-out*: the same from one process to eight at once; the time is that of the last one.
- *line*: the same through the link relay. The share of the line counts from the first byte that can arrive (a request
  takes one round trip, whoever makes it) at the rate that was asked for; plain TCP through the same relay is beside it.

The relay itself is measured without a line. Prints a table and, with `--json FILE`, writes the figures. Exit status 1
when a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks.network_ends import Node, SocketClient, SocketServer, free_port
from psyche_node.relay.spec import LinkSpec

MB = 1_000_000
BLOB = 64 * MB
PEERS = 8
# Long enough that what is measured is the line, and not how a connection starts.
LINES = {"100mbit/80ms": 32 * MB, "100mbit/200ms": 32 * MB, "1gbit/80ms": 256 * MB, "1gbit/200ms": 256 * MB}
ONE_OF_TLS, FAN_OUT_OF_TLS, OF_LINE = 0.60, 0.80, 0.95
RELAY_MBIT = 2000.0
# Nodes that have just met talk about it for a while: each takes 5% of a core in the first 10 s, and 0.8% after 30 s.
MEETING_SECONDS = 30.0
# Memory to touch before each measurement, in bytes per byte that is fetched. A virtual machine gives what has been free
# for 2 s back to its host, and getting it again takes longer than a transfer; who writes new files pays for it.
TOUCHED = 4
# After an announcement, before its blob is fetched: gossip passes it around, and its CPU time is not the transfer's.
SETTLE_SECONDS = 0.5
Measure = Callable[[], Awaitable[float]]


async def interleaved(kinds: dict[str, Measure], repeat: int) -> dict[str, list[float]]:
    """Seconds of every repetition, the kinds taking turns; one round before them is not counted."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(repeat + 1):
        for kind, measure in kinds.items():
            took = await measure()
            if number:
                seconds[kind].append(took)
    return seconds


def touch_memory(size: int) -> None:
    """Have ``size`` bytes of the machine's free memory at hand."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


@contextlib.asynccontextmanager
async def sockets(kind: str, count: int, port: int | None = None) -> AsyncIterator[list[SocketClient]]:
    """Clients of one server, connected; through ``port`` if that leads to it."""
    server = None if port else SocketServer(kind)
    clients = [SocketClient(kind, port or server.port) for _ in range(count)] if server or port else []
    try:
        for client in clients:
            await client.ready()
        yield clients
    finally:
        for client in clients:
            await client.stop()
        if server:
            server.stop()


@contextlib.asynccontextmanager
async def network(
    folder: Path, count: int, announced: dict[str, str | int] | None = None
) -> AsyncIterator[tuple[Node, list[Node]]]:
    """One node that serves and ``count`` that fetch, all of them members."""
    folder.mkdir()
    server, *others = nodes = [Node(folder / str(number)) for number in range(count + 1)]
    async with contextlib.AsyncExitStack() as stack:
        bootstrap: list[str] = []
        for node in nodes:
            ready = await node.start(bootstrap, announced if node is server else None)
            stack.push_async_callback(node.stop)
            bootstrap = bootstrap or ready.multiaddrs
        for node in nodes:
            await node.meet(nodes)
        yield server, others


async def at_once(ends: list[Callable[[], Awaitable[float]]]) -> float:
    return max(await asyncio.gather(*(end() for end in ends)))


def sent_by(clients: list[SocketClient], size: int) -> Measure:
    return lambda: at_once([lambda client=client: client.fetch(size) for client in clients])  # type: ignore[misc]


def exchanged(server: Node, others: list[Node], size: int) -> Measure:
    async def measure() -> float:
        digest = await server.publish(size)
        await asyncio.sleep(SETTLE_SECONDS)
        touch_memory(TOUCHED * size * len(others))
        took = await at_once([lambda node=node: node.fetch(digest, size) for node in others])  # type: ignore[misc]
        for node in (server, *others):
            await node.forget()
        return took

    return measure


async def measure_ends(folder: Path, peers: int, size: int, repeat: int, meeting: float) -> dict[str, Any]:
    """Plain TCP, TLS and the exchange, from one to ``peers`` processes; MB/s of all of them together."""
    async with (
        sockets("raw", peers) as raw,
        sockets("tls", peers) as tls,
        network(folder / f"to{peers}", peers) as (server, others),
    ):
        await asyncio.sleep(meeting)
        kinds = {"tcp": sent_by(raw, size), "tls": sent_by(tls, size), "exchange": exchanged(server, others, size)}
        seconds = await interleaved(kinds, repeat)
    rates = {kind: [peers * size / MB / one for one in times] for kind, times in seconds.items()}
    found: dict[str, Any] = {kind: statistics.median(values) for kind, values in rates.items()}
    for kind in ("tcp", "tls"):
        shares = [mine / theirs for mine, theirs in zip(rates["exchange"], rates[kind], strict=True)]
        found[f"of_{kind}"] = statistics.median(shares)
    return found | {"all": rates}


@contextlib.contextmanager
def relay(link: str, *lines: list[int]) -> Any:
    """The ports that lead to those of ``lines``, in order; the ports of each entry share a line."""
    command = [sys.executable, "-m", "psyche_node.relay", "--link", link]
    for ports in lines:
        command += ["--to", ",".join(f"127.0.0.1:{port}" for port in ports)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield [int(entry["at"].rpartition(":")[2]) for entry in json.loads(process.stdout.readline())]
    finally:
        process.terminate()
        process.communicate(timeout=30)


async def measure_relay(size: int, repeat: int) -> float:
    """Mbit/s of plain TCP through a relay without a line."""
    server = SocketServer("raw")
    try:
        with relay("unlimited/0", [server.port]) as (port,):
            async with sockets("raw", 1, port) as clients:
                seconds = (await interleaved({"relay": sent_by(clients, size)}, repeat))["relay"]
    finally:
        server.stop()
    return 8 * size / 1e6 / statistics.median(seconds)


async def measure_line(folder: Path, link: str, size: int, repeat: int) -> dict[str, Any]:
    """Plain TCP and the exchange over lines of the same kind: MB/s, and shares of the line."""
    spec = LinkSpec.parse(link)
    server, grpc_port, bulk_port = SocketServer("raw"), free_port(), free_port()
    try:
        with relay(link, [server.port], [grpc_port, bulk_port]) as (raw_port, announced_grpc, announced_bulk):
            announced: dict[str, str | int] = {
                "grpc_port": grpc_port,
                "announce_grpc": f"127.0.0.1:{announced_grpc}",
                "bulk_port": bulk_port,
                "announce_bulk": f"127.0.0.1:{announced_bulk}",
            }
            async with (
                sockets("raw", 1, raw_port) as raw,
                network(folder / link.replace("/", "-"), 1, announced) as (node, others),
            ):
                kinds = {"tcp": sent_by(raw, size), "exchange": exchanged(node, others, size)}
                seconds = await interleaved(kinds, repeat)
    finally:
        server.stop()
    found: dict[str, Any] = {"size": size}
    for kind, times in seconds.items():
        found[kind] = size / MB / statistics.median(times)
        found[f"{kind}_of_line"] = size / (statistics.median(times) - spec.rtt) / spec.up_rate
    found["of_tcp"] = statistics.median(a / b for a, b in zip(seconds["tcp"], seconds["exchange"], strict=True))
    return found | {"all": seconds}


async def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }
    }
    size, repeat = int(options.size * MB), options.repeat
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "one" in options.only:
            found["one"] = await measure_ends(folder, 1, size, repeat, options.meeting)
        if "fan-out" in options.only:
            found["fan-out"] = await measure_ends(folder, options.peers, size, max(1, repeat // 2), options.meeting)
        if "line" in options.only:
            found["relay_mbit"] = await measure_relay(4 * size, max(1, repeat // 2))
            found["lines"] = {
                link: await measure_line(folder, link, int(length * options.shrink), options.line_repeat)
                for link, length in LINES.items()
            }
    return found


def report(found: dict[str, Any]) -> list[str]:
    """Print the table; return the goals that were missed."""
    missed = []

    def goal(name: str, value: float, least: float) -> str:
        if value < least:
            missed.append(f"{name}: {value:.0%}, wanted {least:.0%}")
        return f"{value:>8.0%}"

    print(f"{found['machine']['cores']} cores, load average at the start {found['machine']['load']:.1f}")
    print(f"{'MB/s':<24}{'TCP':>8}{'TLS':>8}{'exchange':>10}{'of TCP':>8}{'of TLS':>8}")
    for part, least in (("one", ONE_OF_TLS), ("fan-out", FAN_OUT_OF_TLS)):
        if one := found.get(part):
            print(
                f"{part:<24}{one['tcp']:>8.0f}{one['tls']:>8.0f}{one['exchange']:>10.0f}{one['of_tcp']:>8.0%}"
                f"{goal(part, one['of_tls'], least)}"
            )
    if lines := found.get("lines"):
        mbit = found["relay_mbit"]
        print(f"the relay without a line: {mbit:,.0f} Mbit/s")
        if mbit < RELAY_MBIT:
            missed.append(f"relay: {mbit:,.0f} Mbit/s, wanted {RELAY_MBIT:,.0f}")
        print(f"{'MB/s through':<24}{'TCP':>8}{'':>8}{'exchange':>10}{'of TCP':>8}{'of line':>8}{'TCP of line':>13}")
        for link, one in lines.items():
            print(
                f"{link:<24}{one['tcp']:>8.1f}{'':>8}{one['exchange']:>10.1f}{one['of_tcp']:>8.0%}"
                f"{goal(link, one['exchange_of_line'], OF_LINE)}{one['tcp_of_line']:>13.0%}"
            )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=BLOB / MB, help="MB of a blob (default: 64)")
    parser.add_argument("--peers", type=int, default=PEERS, help="processes of the fan-out (default: 8)")
    parser.add_argument("--repeat", type=int, default=15, help="repetitions of one; half as many of the rest")
    parser.add_argument("--only", nargs="+", choices=("one", "fan-out", "line"), default=["one", "fan-out", "line"])
    parser.add_argument("--folder", type=Path, help="where blobs are written (default: the temporary folder)")
    parser.add_argument("--quick", action="store_true", help="see that it works: small blobs, no goals")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    options.shrink, options.line_repeat, options.meeting = 1.0, 3, MEETING_SECONDS
    if options.quick:
        options.size, options.peers, options.repeat = 8.0, 3, 2
        options.shrink, options.line_repeat, options.meeting = 0.1, 1, 0.0
    found = asyncio.run(measure_all(options))
    missed = report(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if options.quick:
        return 0
    print("goals: " + ("met" if not missed else "MISSED: " + "; ".join(missed)))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
