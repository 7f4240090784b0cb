"""Commands that send one transaction about one run: the options that all have, and what they work with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
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
from coordinator.admin.sending import Manner, Step, carry_out
from coordinator.admin.session import RunChoice, go
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
    return address_of(text, "the key")


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


_COMMON: Final = inspect.signature(_common, eval_str=True).parameters

Command = Callable[..., Coroutine[Any, Any, None]]


def acting(app: typer.Typer, name: str, *, asks: bool = False) -> Callable[[Command], Command]:
    """Register `async def command(one: Act, ...)` under `name`.

    Its own parameters become arguments and options behind RUN, and are followed by those that all commands have;
    `--yes` is one of them where it `asks` before what cannot be undone.
    """

    def register(command: Command) -> Command:
        common = {key: value for key, value in _COMMON.items() if asks or key != "yes"}
        own = dict(inspect.signature(command, eval_str=True).parameters)
        del own[next(iter(own))]  # the Act

        def run_command(**given: Any) -> None:
            ask = _common(**{key: given.pop(key) for key in common})

            async def act() -> None:
                async with ask.open() as one:
                    await command(one, **given)

            go(act())

        both = [common["run"], *own.values(), *(value for key, value in common.items() if key != "run")]
        # typer reads the signature: what it may not have twice is RUN, and options come in any order.
        run_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in both]
        )
        run_command.__annotations__ = {one.name: one.annotation for one in both}
        run_command.__doc__ = command.__doc__
        app.command(name)(run_command)
        return command

    return register
