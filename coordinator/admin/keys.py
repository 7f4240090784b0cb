"""`psyche-admin keys`: wallets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.admin.options import AsJson
from coordinator.admin.output import show
from coordinator.admin.session import chain_at, go
from coordinator.funds import sol
from coordinator.wallet import create_keypair, load_keypair

app = typer.Typer(help="Wallets: Solana keypair files.", no_args_is_help=True)


@app.command("new")
def new(
    path: Annotated[Path, typer.Argument(help="File to make; it must not exist.")], as_json: AsJson = False
) -> None:
    """Make a wallet. Whoever has the file has the funds: it is made for you alone to read."""

    async def act() -> None:
        address = create_keypair(path).pubkey()
        show({"address": str(address), "path": str(path)}, as_json, f"wallet [bold]{address}[/bold] in {path}")

    go(act())


@app.command("show")
def show_wallet(
    path: Annotated[Path, typer.Argument(help="Wallet file.")],
    rpc: Annotated[list[str] | None, typer.Option("--rpc", help="RPC endpoint, to show the balance too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a wallet's address and, with --rpc, its balance."""

    async def act() -> None:
        address = load_keypair(path).pubkey()
        result: dict[str, Any] = {"address": str(address)}
        text = f"[bold]{address}[/bold]"
        if rpc:
            async with chain_at(rpc) as chain:
                result["lamports"] = await chain.balance(address)
            text += f"  {sol(result['lamports'])} SOL"
        show(result, as_json, text)

    go(act())
