"""`psyche-admin`: deploy the program, create and look at runs, make and fund wallets."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Coroutine
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from solders.pubkey import Pubkey

from coordinator.chain import Chain, ChainError, ChainUnavailable, ProgramError, RpcError
from coordinator.client import CoordinatorClient
from coordinator.deploy import deploy
from coordinator.find_run import find_run
from coordinator.program import program_bytes
from coordinator.run_config import ConfigError, load_settings
from coordinator.run_report import RunReport
from coordinator.state import MalformedAccount
from coordinator.wallet import WalletError, create_keypair, load_keypair, load_or_create_keypair

LAMPORTS_PER_SOL: Final = 1_000_000_000
DEFAULT_RPC: Final = "http://127.0.0.1:8899"
_PLAIN_WIDTH: Final = 100
# Somebody is waiting in front of it.
_PATIENCE: Final = 10.0


class AdminExit(IntEnum):
    """Exit status of `psyche-admin`; 2 is a wrong command line."""

    FAILED = 1
    UNAVAILABLE = 3
    REFUSED = 4


app = typer.Typer(
    name="psyche-admin",
    help="Deploy the coordinator program, create and watch runs, manage wallets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
program_app = typer.Typer(help="The on-chain program.", no_args_is_help=True)
run_app = typer.Typer(help="Runs: create one, look at one.", no_args_is_help=True)
wallet_app = typer.Typer(help="Wallets: Solana keypair files.", no_args_is_help=True)
app.add_typer(program_app, name="program")
app.add_typer(run_app, name="run")
app.add_typer(wallet_app, name="wallet")

Rpc = Annotated[
    list[str], typer.Option("--rpc", help="RPC endpoint; give it several times for fail-over.", show_default=True)
]
Payer = Annotated[Path, typer.Option("--payer", help="Wallet file that pays, signs and will own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PriorityFee = Annotated[int, typer.Option(min=0, help="Micro-lamports per compute unit, for a busy cluster.")]
Address = Annotated[str | None, typer.Option(help="Address of the coordinator program.")]
_RPC_DEFAULT: Final = [DEFAULT_RPC]


# ---------------------------------------------------------------------- commands


@program_app.command("deploy")
def program_deploy(
    payer: Payer,
    so: Annotated[Path | None, typer.Argument(help="Program file; the one of this package if left out.")] = None,
    rpc: Rpc = _RPC_DEFAULT,
    program_keypair: Annotated[
        Path | None,
        typer.Option(help="Key of the program's address, made if it is missing. Default: PAYER.program.json"),
    ] = None,
    priority_fee: PriorityFee = 0,
    as_json: AsJson = False,
) -> None:
    """Deploy the program, or upgrade it if its bytes differ. The payer becomes its upgrade authority."""

    async def act() -> None:
        wallet = load_keypair(payer)
        program = load_or_create_keypair(program_keypair or payer.with_name(f"{payer.stem}.program.json"))
        data = program_bytes() if so is None else _file(so)
        async with Chain(rpc, wallet, priority_fee=priority_fee, patience=_PATIENCE) as chain:
            before = await chain.balance(wallet.pubkey())
            address = await deploy(chain, wallet, program, data)
            cost = before - await chain.balance(wallet.pubkey())
        result = {"program": str(address), "authority": str(wallet.pubkey()), "bytes": len(data), "lamports": cost}
        _print(result, as_json, f"program [bold]{address}[/bold]: {len(data):,} bytes, cost {_sol(cost)} SOL")

    _go(act())


@run_app.command("create")
def run_create(
    payer: Payer,
    program: Annotated[str, typer.Option(help="Address of the coordinator program.")],
    run_id: Annotated[str | None, typer.Argument(help="Name of the run, 1 to 32 bytes; overrides the file's.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with run_id, [limits] and [terms].")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. limits.batch=64. Repeatable."),
    ] = None,
    rpc: Rpc = _RPC_DEFAULT,
    priority_fee: PriorityFee = 0,
    as_json: AsJson = False,
) -> None:
    """Create a run. Settings come from a TOML file, from --set, or both; unknown ones are refused."""

    async def act() -> None:
        settings = load_settings(run_id, config, overrides or [])
        limits, terms = settings.on_chain()
        wallet = load_keypair(payer)
        address = _pubkey(program, "--program")
        async with CoordinatorClient(
            rpc, address, None, wallet, priority_fee=priority_fee, patience=_PATIENCE
        ) as client:
            before = await client.balance(wallet.pubkey())
            run = (await client.create_run(settings.run_id, limits, terms)).run
            cost = before - await client.balance(wallet.pubkey())
        result = {"run_id": settings.run_id, "address": str(run), "owner": str(wallet.pubkey()), "lamports": cost}
        text = f"run [bold]{settings.run_id}[/bold] created at {run}, deposit and fees {_sol(cost)} SOL"
        _print(result, as_json, text)

    _go(act())


@run_app.command("show")
def run_show(
    run: Annotated[str, typer.Argument(help="Address of the run's account, or its name.")],
    rpc: Rpc = _RPC_DEFAULT,
    program: Address = None,
    owner: Annotated[str | None, typer.Option(help="Owner's wallet, where several have a run of that name.")] = None,
    as_json: AsJson = False,
    everything: Annotated[bool, typer.Option("--all", help="List every member and commitment.")] = False,
) -> None:
    """Show a run: state, round, members, commitments, inclusion sets and credit, read from the chain alone."""

    async def act() -> None:
        program_key = _pubkey(program, "--program") if program else None
        owner_key = _pubkey(owner, "--owner") if owner else None
        async with Chain(rpc, patience=_PATIENCE) as chain:
            address = await find_run(chain, run, program_key, owner_key)
        async with await CoordinatorClient.open(rpc, address, patience=_PATIENCE) as client:
            report = RunReport(
                program=client.program_id,
                addresses=client.addresses,
                pulse=await client.pulse(),
                members=await client.members(),
                rounds=await client.rounds(),
            )
        if as_json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            _console().print(report.render(everything=everything))

    _go(act())


@wallet_app.command("new")
def wallet_new(
    path: Annotated[Path, typer.Argument(help="File to make; it must not exist.")], as_json: AsJson = False
) -> None:
    """Make a wallet. Whoever has the file has the funds: it is made for you alone to read."""

    async def act() -> None:
        address = create_keypair(path).pubkey()
        _print({"address": str(address), "path": str(path)}, as_json, f"wallet [bold]{address}[/bold] in {path}")

    _go(act())


@wallet_app.command("show")
def wallet_show(
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
            async with Chain(rpc, patience=_PATIENCE) as chain:
                result["lamports"] = await chain.balance(address)
            text += f"  {_sol(result['lamports'])} SOL"
        _print(result, as_json, text)

    _go(act())


@app.command("airdrop")
def airdrop(
    to: Annotated[str, typer.Argument(help="Address, or a wallet file.")],
    amount: Annotated[str, typer.Argument(help="SOL, up to 9 decimals.")] = "10",
    rpc: Rpc = _RPC_DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Get SOL from the faucet of a test chain."""

    async def act() -> None:
        path = Path(to)
        address = load_keypair(path).pubkey() if path.is_file() else _pubkey(to, "the receiver")
        lamports = _lamports(amount)
        async with Chain(rpc, patience=_PATIENCE) as chain:
            await chain.airdrop(address, lamports)
            balance = await chain.balance(address)
        _print(
            {"address": str(address), "lamports": balance}, as_json, f"[bold]{address}[/bold] has {_sol(balance)} SOL"
        )

    _go(act())


# ---------------------------------------------------------------------- helpers


def _console() -> Console:
    # A pipe has no width: use one that fits a page.
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        _console().print(text, highlight=False, soft_wrap=True)


def _fail(text: str, status: AdminExit) -> NoReturn:
    print(f"psyche-admin: {text}", file=sys.stderr)
    raise typer.Exit(status)


def _go(action: Coroutine[Any, Any, None]) -> None:
    """Run a command; what can go wrong ends in one message and an exit status."""
    logging.basicConfig(
        # Retries are not news here: what they come to is said at the end.
        level=logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_time=False, show_path=False)],
    )
    try:
        asyncio.run(action)
    except ProgramError as error:
        _fail(f"the program refused: {error}", AdminExit.REFUSED)
    except ChainUnavailable as error:
        _fail(str(error), AdminExit.UNAVAILABLE)
    except RpcError as error:
        _fail(str(error), AdminExit.REFUSED)
    except (ChainError, WalletError, ConfigError, MalformedAccount) as error:
        _fail(str(error), AdminExit.FAILED)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _pubkey(text: str, what: str) -> Pubkey:
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigError(
            f"{what} {text!r} is neither an address (32 bytes in base58) nor a file that exists"
        ) from None


def _lamports(text: str) -> int:
    try:
        lamports = Decimal(text) * LAMPORTS_PER_SOL
        whole = int(lamports)
    except (InvalidOperation, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not an amount of SOL") from None
    if whole != lamports or not 0 < whole < 2**64:
        raise ConfigError(f"{text} SOL cannot be sent: it must be above 0 and have at most 9 decimals")
    return whole


def _sol(lamports: int) -> str:
    text = f"{Decimal(lamports) / LAMPORTS_PER_SOL:,.9f}"
    return text.rstrip("0").rstrip(".")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
