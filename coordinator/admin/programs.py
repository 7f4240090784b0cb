"""`psyche-admin program`: the on-chain program."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.admin.failures import ProgramDiffers
from coordinator.admin.options import RPC_DEFAULT, AsJson, DryRun, Payer, PriorityFee, Rpc, Yes
from coordinator.admin.output import address_of, confirm, read_file, show
from coordinator.admin.sending import Manner, Step, show_dry_run, simulate
from coordinator.admin.session import chain_at, go
from coordinator.chain import Chain
from coordinator.deploy import (
    DeployCost,
    Deployed,
    DeployError,
    check_program,
    deploy,
    deploy_cost,
    open_buffer,
    present,
    program_hash,
    upgrade,
)
from coordinator.funds import require_funds, sol
from coordinator.idl import NO_ADDRESS, legacy, modern
from coordinator.program import program_bytes
from coordinator.run_costs import fee_of
from coordinator.wallet import load_keypair, load_or_create_keypair

app = typer.Typer(help="The on-chain program.", no_args_is_help=True)

ProgramFile = Annotated[
    Path | None, typer.Argument(metavar="SO", help="Program file; the one of this package if left out.")
]
ProgramKey = Annotated[
    Path | None,
    typer.Option(help="Key of the program's address, made if it is missing. Default: PAYER.program.json"),
]


@app.command("deploy")
def deploy_program(
    payer: Payer,
    so: ProgramFile = None,
    rpc: Rpc = RPC_DEFAULT,
    program_keypair: ProgramKey = None,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Deploy the program. The payer becomes its upgrade authority: who has that wallet can replace it."""

    async def act() -> None:
        wallet = load_keypair(payer)
        data = program_bytes() if so is None else read_file(so)
        check_program(data)
        key = program_keypair or payer.with_name(f"{payer.stem}.program.json")
        # A dry run leaves no key behind; any address costs the same.
        program = Keypair() if dry_run and not key.exists() else load_or_create_keypair(key)
        manner = Manner(wallet, None, dry_run=dry_run, yes=False, as_json=as_json, priority_fee=priority_fee)
        async with chain_at(rpc, wallet, priority_fee) as chain:
            there = await present(chain, program.pubkey())
            if there is not None and not there.is_(data):
                raise DeployError(
                    f"program {program.pubkey()} is on the chain already, with other bytes; to replace it: "
                    f"psyche-admin program upgrade {program.pubkey()}"
                )
            if dry_run:
                await _show_plan(chain, manner, program.pubkey(), there, data)
                return
            if there is None:
                await _require_cost(chain, manner, there, data)
            before = await chain.balance(wallet.pubkey())
            await deploy(chain, wallet, program, data)
            cost = before - await chain.balance(wallet.pubkey())
        _show_done(manner, program.pubkey(), data, cost)

    go(act())


@app.command("upgrade")
def upgrade_program(
    program: Annotated[str, typer.Argument(help="Address of the program, or its key file.")],
    payer: Payer,
    so: ProgramFile = None,
    rpc: Rpc = RPC_DEFAULT,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Replace the program at an address, for all runs that use it. The payer must be its upgrade authority."""

    async def act() -> None:
        wallet = load_keypair(payer)
        data = program_bytes() if so is None else read_file(so)
        check_program(data)
        address = address_of(program, "the program")
        manner = Manner(wallet, None, dry_run=dry_run, yes=yes, as_json=as_json, priority_fee=priority_fee)
        async with chain_at(rpc, wallet, priority_fee) as chain:
            there = await present(chain, address)
            if there is None:
                raise DeployError(f"there is no program {address} on this chain; deploy it first")
            if dry_run:
                await _show_plan(chain, manner, address, there, data)
                return
            if not there.is_(data):
                confirm(
                    f"Program {address} (SHA-256 {there.sha256[:16]}…) will be replaced for every run that uses it; "
                    f"the new one has SHA-256 {program_hash(data)[:16]}….",
                    yes=yes,
                )
                await _require_cost(chain, manner, there, data)
            before = await chain.balance(wallet.pubkey())
            await upgrade(chain, wallet, address, data)
            cost = before - await chain.balance(wallet.pubkey())
        _show_done(manner, address, data, cost)

    go(act())


@app.command("verify")
def verify_program(
    program: Annotated[str, typer.Argument(help="Address of the program, or its key file.")],
    so: ProgramFile = None,
    build: Annotated[
        bool, typer.Option("--build", help="Compile the C sources of this package and compare with that.")
    ] = False,
    rpc: Rpc = RPC_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Check that the program on the chain is the one built here, and say who may replace it."""

    async def act() -> None:
        address = address_of(program, "the program")
        expected = _built() if build else program_bytes() if so is None else read_file(so)
        check_program(expected)
        async with chain_at(rpc) as chain:
            there = await present(chain, address)
        if there is None:
            raise DeployError(f"there is no program {address} on this chain")
        same = there.is_(expected)
        here = program_hash(expected)
        authority = None if there.authority is None else str(there.authority)
        result: dict[str, Any] = {
            "program": str(address),
            "same": same,
            "sha256": there.sha256,
            "expected_sha256": here,
            "upgrade_authority": authority,
            "deployed_slot": there.slot,
            "bytes": len(there.data.rstrip(b"\0")),
            "room": len(there.data),
        }
        lines = [
            f"program  [bold]{address}[/bold]",
            f"on chain {there.sha256}  [dim]{result['bytes']:,} bytes, deployed in slot {there.slot:,}[/dim]",
            f"here     {here}  {'[green]the same[/green]' if same else '[red]another program[/red]'}",
            f"upgrade  {f'{authority} may replace it at any time' if authority else 'nobody can replace it any more'}",
        ]
        show(result, as_json, "\n".join(lines))
        if not same:
            raise ProgramDiffers(f"program {address} is not the one built here")

    go(act())


@app.command("idl")
def show_idl(
    program: Annotated[
        str | None, typer.Argument(help="Address of the program, to be written into it; or its key file.")
    ] = None,
    old: Annotated[bool, typer.Option("--legacy", help="The format before Anchor 0.30, as anchorpy reads it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it in one line; it is JSON either way.")] = False,
) -> None:
    """Print the program's interface description, for Anchor clients and explorers."""

    async def act() -> None:
        address = str(address_of(program, "the program")) if program else NO_ADDRESS
        print(json.dumps(legacy(address) if old else modern(address), indent=None if as_json else 1))

    go(act())


def _built() -> bytes:
    """The program compiled here and now. Raises DeployError."""
    from coordinator.toolchain.build import BuildError, build

    try:
        return build()
    except BuildError as error:
        raise DeployError(f"the program cannot be built here: {error}") from error


async def _require_cost(chain: Chain, manner: Manner, there: Deployed | None, so: bytes) -> DeployCost:
    """What it will take. Raises Unfunded for a wallet that has less: it would end in the middle."""
    cost = await deploy_cost(chain, there, so, lambda signatures: fee_of(signatures, manner.priority_fee))
    await require_funds(chain, manner.payer.pubkey(), cost.deposit + cost.fees + cost.lent, "this")
    return cost


async def _show_plan(chain: Chain, manner: Manner, address: Pubkey, there: Deployed | None, so: bytes) -> None:
    """Simulate what can be before the buffer exists, and reckon the rest."""
    if there is not None and there.is_(so):
        show(
            {"program": str(address), "dry_run": True, "lamports": 0, "transactions": []},
            manner.as_json,
            f"dry run: these bytes are at {address} already; nothing would be sent",
        )
        return
    if there is not None and there.authority != manner.payer.pubkey():
        raise DeployError(f"program {address} can only be upgraded by {there.authority}; pay with that wallet")
    cost = await _require_cost(chain, manner, there, so)
    total = cost.deposit + cost.fees
    buffer = Keypair()
    step = Step("open a buffer for the program", open_buffer(chain, manner.payer.pubkey(), buffer.pubkey(), so))
    simulated = await simulate(chain, manner, step)
    result = {
        "program": str(address),
        "bytes": len(so),
        "sha256": hashlib.sha256(so).hexdigest(),
        "transaction_count": cost.transactions,
        "deposit": cost.deposit,
        "fees": cost.fees,
        "simulated": "the first transaction; the others build on it",
    }
    show_dry_run(manner, [(step, simulated)], total, result)
    if not manner.as_json:
        print(f"  then {cost.transactions - 1} more transactions, which cannot be simulated before that one is sent")


def _show_done(manner: Manner, address: Pubkey, so: bytes, cost: int) -> None:
    result = {
        "program": str(address),
        "authority": str(manner.payer.pubkey()),
        "bytes": len(so),
        "sha256": program_hash(so),
        "lamports": cost,
    }
    text = f"program [bold]{address}[/bold]: {len(so):,} bytes, cost {sol(cost)} SOL"
    show(result, manner.as_json, text)
