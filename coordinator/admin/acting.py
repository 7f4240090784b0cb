"""Commands that send one transaction about one run: the options that all have, and what they work with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.admin.options import (
    RPC_DEFAULT,
    AsJson,
    DryRun,
    OwnerAddress,
    Payer,
    PriorityFee,
    ProgramAddress,
    Rpc,
    RunName,
    Yes,
)
from coordinator.admin.output import address_of
from coordinator.admin.registering import Command, parameters, register
from coordinator.admin.sending import Manner, Step, carry_out
from coordinator.admin.session import RunChoice
from coordinator.base58 import base58_decode
from coordinator.client import CoordinatorClient
from coordinator.run_config import ConfigError
from coordinator.wallet import load_keypair

_PEER_ID_HEAD = b"\x00\x24\x08\x01\x12\x20"


@dataclass(frozen=True, slots=True)
class Ask:
    """What was typed: which run, who pays and signs, and how careful to be."""

    choice: RunChoice
    payer: Path
    priority_fee: int
    dry_run: bool
    as_json: bool
    yes: bool = False

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Act]:
        """Raises WalletError, RunNotFound, ConfigError, ChainUnavailable."""
        wallet = load_keypair(self.payer)
        async with self.choice.open(wallet, self.priority_fee) as client:
            yield Act(client, wallet, self)


@dataclass(frozen=True, slots=True)
class Act:
    """A command at work: the run's client and the wallet."""

    client: CoordinatorClient
    wallet: Keypair
    ask: Ask

    @property
    def me(self) -> Pubkey:
        return self.wallet.pubkey()

    @property
    def of_run(self) -> tuple[Any, Pubkey, Pubkey]:
        """First arguments of the program's instruction builders."""
        return self.client.addresses, self.client.program_id, self.me

    async def send(
        self,
        what: str,
        *instructions: Instruction,
        done: str,
        caution: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """Send it, or in a dry run say what it would do.

        Args:
            what, done: before and after, in a few words (rich markup).
            caution: what cannot be undone, as a sentence.
            result: goes into the JSON.
        """
        ask = self.ask
        manner = Manner(
            self.wallet,
            self.client.program_id,
            dry_run=ask.dry_run,
            yes=ask.yes,
            as_json=ask.as_json,
            priority_fee=ask.priority_fee,
        )
        about = {"run": str(self.client.addresses.run), **(result or {})}
        await carry_out(self.client, manner, Step(what, instructions), about, done, caution)

    async def wallet_of(self, text: str) -> Pubkey:
        """A member's wallet by its slot in the run, its address, or a wallet file. Raises ConfigError."""
        if not text.isdecimal():
            return address_of(text, "the member")
        found = [member.wallet for member in await self.client.members() if member.slot == int(text)]
        if not found:
            raise ConfigError(f"the run has no member {text}; `run show` lists them by number")
        return found[0]


def key_of(text: str) -> Pubkey:
    """Any key that can be banned: an address, a wallet file, a node's id, or 64 hex digits. Raises ConfigError."""
    with contextlib.suppress(ValueError):
        if len(text) == 64:
            return Pubkey.from_bytes(bytes.fromhex(text))
        if text.startswith("12D3Koo") and len(text) <= 64:
            raw = base58_decode(text)
            if raw[:6] == _PEER_ID_HEAD and len(raw) == 38:
                return Pubkey.from_bytes(raw[6:])
    try:
        return address_of(text, "the key")
    except ConfigError as error:
        raise ConfigError(f"{error}; nor is it a node's id (12D3KooW...) or key (64 hex digits)") from None


def _common(
    run: RunName,
    payer: Payer,
    rpc: Rpc = RPC_DEFAULT,
    program: ProgramAddress = None,
    owner: OwnerAddress = None,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> Ask:
    """The options of every command that acts on a run."""
    return Ask(RunChoice(rpc, run, program, owner), payer, priority_fee, dry_run, as_json, yes)


_COMMON: Final = parameters(_common)


def acting(app: typer.Typer, name: str, *, asks: bool = False) -> Callable[[Command], Command]:
    """Register `async def command(one: Act, ...)` under `name`; its own parameters follow RUN.

    `--yes` is one of the options that all have where it `asks` before what cannot be undone.
    """
    common = {key: value for key, value in _COMMON.items() if asks or key != "yes"}

    def decorate(command: Command) -> Command:
        async def start(shared: dict[str, Any], own: dict[str, Any]) -> None:
            async with _common(**shared).open() as one:
                await command(one, **own)

        return register(app, name, command, common, start)

    return decorate
