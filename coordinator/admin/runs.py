"""`psyche-admin run`: create runs and look at them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from solders.pubkey import Pubkey

from coordinator import instructions
from coordinator.addresses import run_addresses
from coordinator.admin.created import Created, slot_seconds
from coordinator.admin.folders import Folders
from coordinator.admin.options import (
    RPC_DEFAULT,
    AsJson,
    DryRun,
    Payer,
    PriorityFee,
    Rpc,
)
from coordinator.admin.output import console, pubkey
from coordinator.admin.reading import Look, reading
from coordinator.admin.sending import Manner, Step, carry_out, rehearse
from coordinator.admin.session import PATIENCE, chain_at, go
from coordinator.client import CoordinatorClient, RunExists
from coordinator.find_run import FoundRun, all_runs
from coordinator.printable import printable
from coordinator.recipes import load_recipe
from coordinator.run_config import RECIPE, ConfigError, RunSettings, SettingsTable, settings_table
from coordinator.run_report import PHASE_STYLES, RunReport
from coordinator.snapshot import take_snapshot
from coordinator.wallet import load_keypair

app = typer.Typer()


@app.command("create")
def create(
    payer: Payer,
    program: Annotated[str, typer.Option(help="Address of the coordinator program.")],
    run_id: Annotated[str | None, typer.Argument(help="Name of the run, 1 to 32 bytes; overrides the file's.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A shipped recipe to begin with (psyche-node recipe list); the file goes over it."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with run_id, [limits] and [terms].")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. batch=64 or limits.batch=64. Repeatable."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder the run starts from: model_root, layout_digest, update_bytes."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data folder: data_manifest, samples, sequence_length.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Type of the trained weights; part of the layout digest.")
    ] = "fp32",
    other_tokenizer: Annotated[
        bool,
        typer.Option("--other-tokenizer", help="Take data that was prepared with another tokenizer than the model's."),
    ] = False,
    rpc: Rpc = RPC_DEFAULT,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Create a run, owned by the payer. Settings come from a recipe, a TOML file and --set, of which the later ones
    win; unknown ones are refused. What follows from the model and the data is worked out from their folders: it goes
    over a recipe's, and has to agree with what the file and --set say."""

    async def act() -> None:
        wallet, program_id = load_keypair(payer), pubkey(program, "--program")
        owner = wallet.pubkey()
        base = load_recipe(recipe).settings() if recipe else None
        table = settings_table(run_id, config, overrides or [], base)
        folders, computed = Folders(model, data, precision, other_tokenizer), dict[str, Any]()
        warnings = list[str]()
        settings = folders.draft(table)
        authority = Pubkey.from_string(settings.join_authority) if settings.join_authority else None
        places = run_addresses(program_id, owner, settings.run_id)
        run = places.run
        async with CoordinatorClient(
            rpc, program_id, None, wallet, priority_fee=priority_fee, patience=PATIENCE
        ) as client:
            _, taken = await client.accounts([places.run, places.members, places.rounds], (0, 0))
            if taken[0] is not None and taken[0].owner == program_id:
                raise RunExists(f"{owner} has a run {settings.run_id!r} already, at {run}; choose another name")
            if any(taken):
                # Whoever knows owner and name can send lamports there, and no account can be created then.
                raise ConfigError(f"an address that run {settings.run_id!r} needs is taken; choose another name")
            await client.load_rent()
            manner = Manner(wallet, program_id, dry_run=dry_run, yes=False, as_json=as_json, priority_fee=priority_fee)

            def step(settings: RunSettings) -> Step:
                limits, terms = settings.limits.on_chain(), settings.terms.on_chain()
                made = instructions.create_run_instructions(
                    program_id, owner, settings.run_id, limits, terms, client.rent_exempt, join_authority=authority
                )
                return Step(f"create the three accounts of run {settings.run_id!r} at {run} and start it", made)

            if folders.any:
                # Weights of 70 GB take minutes to read: whatever else is wrong is told before.
                await rehearse(client, manner, step(settings))
                computed = await asyncio.to_thread(folders.terms, table, settings.terms.topk, warnings.append)
                for line in folder_lines(table, computed):
                    print(line, file=sys.stderr)
                settings = table.with_terms(computed).checked()
            created = Created(settings, await slot_seconds(client))
            for line in () if as_json else created.lines():
                print(line)
            for caution in (*created.cautions(), *warnings):
                print(f"warning: {caution}", file=sys.stderr)
            about = {"run_id": settings.run_id, "address": str(run), "owner": str(owner), "computed": computed}
            await carry_out(
                client,
                manner,
                step(settings),
                about | created.to_json(),
                f"run [bold]{escape(settings.run_id)}[/bold] created at {run}",
            )

    go(act())


def folder_lines(table: SettingsTable, computed: Mapping[str, Any]) -> Iterator[str]:
    """What the folders gave, and what of a recipe it goes over."""
    before = table.terms()
    for key, value in computed.items():
        of_recipe = key in before and table.origin("terms", key) == RECIPE and before[key] != value
        over = f" (the recipe has {before[key]})" if of_recipe else ""
        yield f"computed from the folders: terms.{key} = {value}{over}"


@reading(app, "show")
async def show(
    one: Look,
    everything: Annotated[bool, typer.Option("--all", help="List every member and commitment.")] = False,
) -> None:
    """Show a run: state, round, members, commitments, inclusion sets and credit, read from the chain alone."""
    async with one.open() as client:
        report = RunReport(client.program_id, client.addresses, await take_snapshot(client))
    if one.as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        console().print(report.render(everything=everything))


@app.command("list")
def list_runs(
    rpc: Rpc = RPC_DEFAULT,
    program: Annotated[
        str | None, typer.Option(help="Address of the coordinator program; all programs of a small chain if left out.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Only the runs of this wallet.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs on a chain."""

    async def act() -> None:
        program_id = pubkey(program, "--program") if program else None
        owner_key = pubkey(owner, "--owner") if owner else None
        async with chain_at(rpc) as chain:
            found = await all_runs(chain, program_id)
        found = sorted(
            (one for one in found if owner_key in (None, one.run.owner)),
            key=lambda one: (-one.run.created_slot, one.run.run_id),
        )
        if as_json:
            print(json.dumps([_run_json(one) for one in found]))
        elif found:
            console().print(_run_table(found))
        else:
            print("no runs")

    go(act())


def _run_json(found: FoundRun) -> dict[str, object]:
    run = found.run
    return {
        "run_id": run.run_id,
        "address": str(found.address),
        "owner": str(run.owner),
        "program": str(found.program),
        "state": run.phase.name,
        "round": run.round,
        "total_rounds": run.limits.total_rounds,
        "members": run.member_count,
        "tokens": run.tokens,
        "created_slot": run.created_slot,
    }


def _run_table(found: list[FoundRun]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("run", "state", "round", "members", "tokens"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for one in found:
        run = one.run
        table.add_row(
            f"[bold]{escape(printable(run.run_id))}[/bold]\n{one.address}\n[dim]owner {run.owner}[/dim]",
            f"[{PHASE_STYLES.get(run.phase, 'bold')}]{run.phase.name}",
            f"{run.round:,} of {run.limits.total_rounds:,}",
            f"{run.member_count:,}",
            f"{run.tokens:,}",
        )
    return table
