"""`psyche-ledger`: a Solana ledger in one process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import time
from typing import Annotated

import typer

# Imported for their effect: they register the methods.
from coordinator.ledger import methods as _methods  # noqa: F401
from coordinator.ledger import transactions as _transactions  # noqa: F401
from coordinator.ledger.bank import AdvanceSlot, Bank
from coordinator.ledger.dispatch import Rpc
from coordinator.ledger.http import HttpServer
from coordinator.ledger.pubsub import PubSub

log = logging.getLogger(__name__)

EXIT_CANNOT_LISTEN = 3
_PORT_ATTEMPTS = 32

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
) -> None:
    """Run a ledger until SIGTERM or SIGINT.

    Prints one JSON line on standard output when it is ready:
    {"rpc": "http://...", "ws": "ws://...", "slot_ms": 50}.

    In this version the whole ledger lives in memory: it starts empty, and what it held is gone when it ends.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(host, port, slot_ms))
    except OSError as error:
        # A host that does not resolve and a port in use both end here.
        where = f"{host} ports {port} and {port + 1}" if port else host
        print(f"psyche-ledger: cannot listen on {where}: {error.strerror or error}. ", end="", file=sys.stderr)
        print("Choose another --port or --host, or --port 0 to let the system pick.", file=sys.stderr)
        raise typer.Exit(EXIT_CANNOT_LISTEN) from None


async def _serve(host: str, port: int, slot_ms: int) -> None:
    bank = Bank(os.urandom(32), int(time.time()))
    http, pubsub = HttpServer(Rpc(bank).answer), PubSub(bank)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    port = await _listen(http, pubsub, host, port)
    clock = asyncio.create_task(_advance(bank, slot_ms / 1000))
    clock.add_done_callback(lambda _: stopping.set())
    shown = f"[{host}]" if ":" in host else host
    ready = {"rpc": f"http://{shown}:{port}", "ws": f"ws://{shown}:{port + 1}", "slot_ms": slot_ms}
    print(json.dumps(ready), flush=True)
    await stopping.wait()
    if clock.done():
        await clock  # the clock never ends by itself: raise what ended it
    clock.cancel()
    await http.stop()
    await pubsub.stop()


async def _listen(http: HttpServer, pubsub: PubSub, host: str, port: int) -> int:
    """Take two neighbouring ports. Returns the first."""
    if port:
        await http.start(host, port)
        await pubsub.start(host, port + 1)
        return port
    # A name with several addresses would get another free port on each: take the first address.
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    address = str(found[0][4][0])
    for attempt in range(_PORT_ATTEMPTS):
        picked = await http.start(address, 0)
        try:
            await pubsub.start(address, picked + 1)
        except (OSError, OverflowError):
            await http.stop()
            if attempt == _PORT_ATTEMPTS - 1:
                raise
        else:
            return picked
    raise AssertionError("unreachable")


async def _advance(bank: Bank, slot_seconds: float) -> None:
    """The clock. Slots follow real time: those that a busy machine missed are skipped, as a cluster skips them."""
    loop = asyncio.get_running_loop()
    start, first = loop.time(), bank.slot
    while True:
        elapsed = int((loop.time() - start) / slot_seconds)
        if first + elapsed > bank.slot:
            bank.apply(AdvanceSlot(first + elapsed, int(time.time())))
        await asyncio.sleep(start + (elapsed + 1) * slot_seconds - loop.time())


def main() -> None:
    app()


if __name__ == "__main__":
    main()
