"""`psyche-admin ledger`: the chain behind an endpoint, and funds on a test chain."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from coordinator.admin.health import probe
from coordinator.admin.options import RPC_DEFAULT, AsJson, Rpc
from coordinator.admin.output import address_of, lamports_of, show
from coordinator.admin.registering import TakesNumbers
from coordinator.admin.session import PATIENCE, chain_at, go
from coordinator.chain import ChainUnavailable
from coordinator.funds import sol

app = typer.Typer(help="The chain behind an endpoint; funds on a test chain.", no_args_is_help=True)

_HINT: Final = """\
For a chain of your own, in another terminal:
    psyche-ledger run                               # prints its URL, and runs until Ctrl-C
    psyche-admin keys new owner.json
    psyche-admin ledger airdrop owner.json 100      # SOL that are worth nothing elsewhere
    psyche-admin program deploy --payer owner.json"""


@app.command("airdrop", cls=TakesNumbers)
def airdrop(
    to: Annotated[str, typer.Argument(help="Address, or a wallet file.")],
    amount: Annotated[str, typer.Argument(help="SOL, up to 9 decimals.")] = "10",
    rpc: Rpc = RPC_DEFAULT,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say who would get how much, and ask the faucet for nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Get SOL from the faucet of a test chain."""

    async def act() -> None:
        address = address_of(to, "the receiver")
        lamports = lamports_of(amount)
        async with chain_at(rpc) as chain:
            if dry_run:
                expected = await chain.balance(address) + lamports
                planned = {"address": str(address), "dry_run": True, "lamports": expected}
                text = f"[bold]dry run[/bold]: nothing was asked for; {address} would have {sol(expected)} SOL"
                show(planned, as_json, text)
                return
            await chain.airdrop(address, lamports)
            balance = await chain.balance(address)
        result = {"address": str(address), "lamports": balance}
        show(result, as_json, f"[bold]{address}[/bold] has {sol(balance)} SOL")

    go(act())


@app.command("show")
def show_ledger(rpc: Rpc = RPC_DEFAULT, as_json: AsJson = False) -> None:
    """Show whether the endpoints answer, how fast, and which chain they serve; if none does, how to start one."""

    async def act() -> None:
        found = await probe(rpc, PATIENCE)
        result: dict[str, Any] = {"endpoints": [one.to_json() for one in found]}
        text = "\n".join(one.text() for one in found)
        show(result, as_json, text)
        if not any(one.healthy for one in found):
            if not as_json:
                print(_HINT, file=sys.stderr)
            raise ChainUnavailable("no endpoint answers")

    go(act())
