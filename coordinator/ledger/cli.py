"""`psyche-ledger`: a Solana ledger in one process."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from typing import Annotated

import typer

from coordinator.ledger.faults import BadFaults, Faults, parse_faults
from coordinator.ledger.server import LedgerServer

log = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_CANNOT_LISTEN = 3

app = typer.Typer(
    name="psyche-ledger",
    help="A Solana ledger in one process: a real Solana VM behind Solana's JSON-RPC and WebSocket API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _root() -> None:
    """A Solana ledger in one process: a real Solana VM behind Solana's JSON-RPC and WebSocket API."""


@app.command()
def run(
    port: Annotated[
        int, typer.Option(min=0, max=65534, help="HTTP port; the WebSocket is on the next one. 0: the system picks.")
    ] = 8899,
    slot_ms: Annotated[int, typer.Option(min=1, max=60_000, help="Length of a slot in milliseconds.")] = 50,
    host: Annotated[str, typer.Option(help="Address to listen on. Anyone who can reach it may use the faucet.")] = (
        "127.0.0.1"
    ),
    faults: Annotated[
        list[str] | None,
        typer.Option(
            help="What goes wrong, for tests: a .toml or .json file, or pairs such as 'lose=0.1, latency_ms=50'. "
            "Each further --faults adds an endpoint, on the next two ports, to the same ledger; '' is one without "
            "faults."
        ),
    ] = None,
) -> None:
    """Run a ledger until SIGTERM or SIGINT.

    Prints one JSON line on standard output when it is ready:
    {"rpc": "http://...", "ws": "ws://...", "slot_ms": 50, "endpoints": [{"rpc": ..., "ws": ...}]}.

    In this version the whole ledger lives in memory: it starts empty, and what it held is gone when it ends.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        endpoints = [parse_faults(text) for text in faults or ()]
    except BadFaults as error:
        print(f"psyche-ledger: --faults: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    try:
        asyncio.run(_serve(host, port, slot_ms, endpoints))
    except OSError as error:
        # A host that does not resolve and a port in use both end here.
        where = f"{host} ports {port} and {port + 1}" if port else host
        print(f"psyche-ledger: cannot listen on {where}: {error.strerror or error}. ", end="", file=sys.stderr)
        print("Choose another --port or --host, or --port 0 to let the system pick.", file=sys.stderr)
        raise typer.Exit(EXIT_CANNOT_LISTEN) from None


async def _serve(host: str, port: int, slot_ms: int, endpoints: list[Faults]) -> None:
    server = LedgerServer(slot_ms=slot_ms, endpoints=endpoints)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    addresses = [{"rpc": one.rpc, "ws": one.ws} for one in await server.start(host, port)]
    print(json.dumps({**addresses[0], "slot_ms": slot_ms, "endpoints": addresses}), flush=True)
    try:
        await server.wait(stopping)
    finally:
        await server.stop()


def main() -> None:
    app()


if __name__ == "__main__":
    main()
