"""`psyche-ledger`: a Solana ledger in one process."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from coordinator.ledger.compaction import SNAPSHOT_EVERY
from coordinator.ledger.descriptors import raise_file_limit
from coordinator.ledger.faults import BadFaults, Faults, parse_faults
from coordinator.ledger.server import LedgerServer
from coordinator.ledger.snapshot import state_hash
from coordinator.ledger.store import Store, StoreError
from coordinator.pipes import end_with_reader

EXIT_USAGE = 2
EXIT_CANNOT_LISTEN = 3
EXIT_STORE = 4
EXIT_CANNOT_WRITE = 5

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
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Folder to keep the ledger in; a new ledger is begun in a new folder. Without it the ledger lives in "
            "memory, and what it held is gone when it ends.",
        ),
    ] = None,
    snapshot_every: Annotated[
        int, typer.Option(min=100, help="Changes (transactions and slots) between snapshots. Fewer: faster restarts.")
    ] = SNAPSHOT_EVERY,
    keep_log: Annotated[
        bool, typer.Option("--keep-log", help="Keep the whole log, so that `check --replay` can replay the chain.")
    ] = False,
) -> None:
    """Run a ledger until SIGTERM or SIGINT.

    Prints one JSON line on standard output when it is ready:
    {"rpc": "http://...", "ws": "ws://...", "slot_ms": 50, "endpoints": [{"rpc": ..., "ws": ...}]}.

    With --dir nothing is answered before it is on disk: a crash at any instant loses nothing that anyone was told.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        endpoints = [parse_faults(text) for text in faults or ()]
    except BadFaults as error:
        print(f"psyche-ledger: --faults: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_USAGE) from None
    raise_file_limit()
    # History is tens of thousands of small objects without cycles: collecting them often is pauses for nothing.
    gc.set_threshold(50_000, 20, 100)
    try:
        asyncio.run(_serve(host, port, slot_ms, endpoints, folder, snapshot_every, keep_log))
    except StoreError as error:
        raise _store_failure(error) from None
    except CannotListen as error:
        print(f"psyche-ledger: cannot listen on {error}. ", end="", file=sys.stderr)
        print("Choose another --port or --host, or --port 0 to let the system pick.", file=sys.stderr)
        raise typer.Exit(EXIT_CANNOT_LISTEN) from None
    except BrokenPipeError:  # nobody waits for the line that says it is ready
        raise
    except OSError as error:
        print(
            f"psyche-ledger: {folder} cannot be written: {error.strerror or error}. Nothing was acknowledged that is "
            "not on disk. Make room (or mend the disk) and start it again.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_CANNOT_WRITE) from None


def _store_failure(error: StoreError) -> typer.Exit:
    print(f"psyche-ledger: {error}.", file=sys.stderr)
    return typer.Exit(EXIT_STORE)


@app.command()
def check(
    folder: Annotated[Path, typer.Option("--dir", help="Folder of a ledger that is not running.")],
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay the whole log from its genesis too (see `run --keep-log`).")
    ] = False,
) -> None:
    """Read a ledger's folder and change nothing: every checksum, and a hash of the whole state.

    Prints one JSON line: {"slot", "changes", "transactions", "state"}; with --replay also "replayed", the hash of the
    state that the log alone gives. Exit status 4 if something is damaged, or if the two differ.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        with _existing(folder, read_only=True) as store:
            opened = store.open()
            found: dict[str, int | str] = {
                "slot": opened.bank.slot,
                "changes": opened.index,
                "transactions": opened.bank.transaction_count,
                "state": state_hash(opened.bank.capture()),
            }
            if replay:
                found["replayed"] = state_hash(store.replayed_from_genesis().capture())
    except StoreError as error:
        raise _store_failure(error) from None
    print(json.dumps(found))
    if found.get("replayed", found["state"]) != found["state"]:
        raise typer.Exit(EXIT_STORE)


@app.command()
def cut(folder: Annotated[Path, typer.Option("--dir", help="Folder of a ledger that is not running.")]) -> None:
    """Give up everything from the first damage in a ledger's log on. Only where there is no copy to restore.

    What is cut off stays in the folder, in files that end with .damaged.
    """
    try:
        with _existing(folder) as store:
            done = store.cut()
    except StoreError as error:
        raise _store_failure(error) from None
    print("nothing is damaged" if done is None else f"kept {done[0]} changes, cut off {done[1]} bytes (*.damaged)")


def _existing(folder: Path, *, read_only: bool = False) -> Store:
    if not (folder / "genesis.json").exists():
        raise StoreError(
            f"{folder} is not a ledger's folder (it has no genesis.json). Name the one given to `run --dir`"
        )
    return Store(folder, 0, read_only=read_only)


class CannotListen(Exception):
    """A host that does not resolve, or a port in use."""


async def _serve(
    host: str,
    port: int,
    slot_ms: int,
    endpoints: list[Faults],
    folder: Path | None,
    snapshot_every: int,
    keep_log: bool,
) -> None:
    server = LedgerServer(
        folder, slot_ms=slot_ms, endpoints=endpoints, snapshot_every=snapshot_every, keep_log=keep_log
    )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        listening = await server.start(host, port)
    except OSError as error:
        await server.stop()
        where = f"{host} ports {port} and {port + 1}" if port else host
        raise CannotListen(f"{where}: {error.strerror or error}") from None
    addresses = [{"rpc": one.rpc, "ws": one.ws} for one in listening]
    print(json.dumps({**addresses[0], "slot_ms": slot_ms, "endpoints": addresses}), flush=True)
    try:
        await server.wait(stopping)
    finally:
        await server.stop()


def main() -> None:
    end_with_reader(app)


if __name__ == "__main__":
    main()
