"""`psyche-admin run export` and `run verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from coordinator.admin.checking import Checked, check_consistency, compare_accounts, compare_events
from coordinator.admin.exporting import lines_of, read_past
from coordinator.admin.options import RPC_DEFAULT, AsJson, OwnerAddress, ProgramAddress, Rpc, RunName
from coordinator.admin.output import show
from coordinator.admin.record import InvalidRecord, Record, read_record, write_record
from coordinator.admin.session import RunChoice, chain_at, go
from coordinator.history import happenings, signatures_of
from coordinator.printable import printable
from coordinator.wallet import load_keypair

app = typer.Typer()


@app.command("export")
def export(
    run: RunName,
    out: Annotated[Path, typer.Option("--out", help="File to write; it must not exist.")],
    wallet: Annotated[Path, typer.Option("--wallet", help="Wallet file that signs the record; it pays nothing.")],
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what the endpoint has, where it does not reach back to the start.")
    ] = False,
    rpc: Rpc = RPC_DEFAULT,
    program: ProgramAddress = None,
    owner: OwnerAddress = None,
    as_json: AsJson = False,
) -> None:
    """Write what the chain says of a run, from its first event on, into a signed file: who trained what, which updates
    count, everybody's credit, model roots."""

    async def act() -> None:
        signer = load_keypair(wallet)
        async with RunChoice(rpc, run, program, owner).open() as client:
            past = await read_past(client, partial=partial)
            genesis = str(await client.rpc.call("getGenesisHash"))
            lines = lines_of(past, client.addresses.run, client.program_id, genesis)
        count = write_record(out, lines, signer)
        result: dict[str, Any] = {
            "path": str(out),
            "lines": count,
            "events": len(past.events),
            "rounds": sum(line["kind"] == "round" for line in lines),
            "complete": past.complete,
            "signer": str(signer.pubkey()),
        }
        text = (
            f"{out}: {count:,} lines, {result['events']:,} events, {result['rounds']:,} rounds, "
            f"signed by {signer.pubkey()}"
        )
        show(result, as_json, text if past.complete else f"{text} [yellow](not from the beginning)[/yellow]")

    go(act())


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="A record that `run export` wrote.")],
    rpc: Annotated[
        list[str] | None, typer.Option("--rpc", help="RPC endpoint, to compare with the chain too; repeatable.")
    ] = None,
    signer: Annotated[str | None, typer.Option(help="Wallet that must have signed it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a record: its signature, that it is consistent, and with --rpc that the chain says the same."""

    async def act() -> None:
        record = read_record(file)
        found = check_consistency(record)
        if signer is not None and signer != str(record.signer):
            raise InvalidRecord(f"it is signed by {record.signer}, not by {signer}")
        since = await _since(record, found, rpc) if rpc else None
        result: dict[str, Any] = {
            "valid": True,
            "run_id": found.run_id,
            "address": str(found.address),
            "signer": str(record.signer),
            "complete": found.complete,
            "events": found.events,
            "rounds": found.rounds,
            "members": found.members,
            "tokens": found.tokens,
            "events_since": since,
        }
        lines = [
            f"[green]✓[/green] signed by {record.signer}",
            f"[green]✓[/green] consistent: run {escape(printable(found.run_id))}, {found.rounds:,} final rounds, "
            f"{found.tokens:,} tokens, {found.events:,} events",
        ]
        if not found.complete:
            lines.append("[yellow]![/yellow] not from the run's beginning: positions and credit cannot be followed")
        if since is not None:
            lines.append(f"[green]✓[/green] the chain says the same; {since:,} events have happened since")
        show(result, as_json, "\n".join(lines))

    go(act())


async def _since(record: Record, found: Checked, rpc: list[str]) -> int:
    """How many events have happened since, if the chain says what the record says.

    Raises:
        InvalidRecord: it does not.
        HistoryIncomplete: the endpoint does not have the part of the run's history that the record is about.
    """
    async with chain_at(rpc) as chain:
        genesis = str(await chain.rpc.call("getGenesisHash"))
        signatures = await signatures_of(chain, found.address)
        names = [name for name, succeeded in signatures if succeeded]
        history, gap = await happenings(chain, found.program, found.address, names)
    since = compare_events(record, history, gap, genesis)
    if since == 0:
        # So the run was not closed, and its accounts are those of the record, if it still stands there.
        async with RunChoice(rpc, str(found.address)).open() as client:
            past = await read_past(client, partial=True)
        since = compare_events(record, past.events, None, genesis)
        if since == 0:
            compare_accounts(record, past, found.address, found.program, genesis)
    return since
