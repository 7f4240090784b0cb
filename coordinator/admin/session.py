"""Running a command: connections, and what can go wrong, which ends in one message and an exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.admin.exits import AdminExit
from coordinator.admin.failures import message_of, status_of
from coordinator.admin.output import pubkey
from coordinator.chain import Chain
from coordinator.client import CoordinatorClient
from coordinator.find_run import open_run
from coordinator.printable import LINES, printable

# Seconds; somebody is waiting in front of it.
PATIENCE = 10.0


def go(action: Coroutine[Any, Any, None]) -> None:
    """Run a command to its end. Raises typer.Exit for one that fails in a way that its user can resolve."""
    said = logging.StreamHandler()
    said.setFormatter(_AsMessages())
    # Retries are not news here: what they come to is said at the end.
    logging.basicConfig(level=logging.ERROR, handlers=[said])
    try:
        asyncio.run(action)
    except KeyboardInterrupt:
        raise typer.Exit(AdminExit.INTERRUPTED) from None
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        print(_message(message_of(error)), file=sys.stderr)
        raise typer.Exit(status) from None


class _AsMessages(logging.Formatter):
    """A line of the log in the form of this command's other messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _message(super().format(record))


def _message(text: str) -> str:
    return f"psyche-admin: {printable(text, LINES)}"


def chain_at(
    rpc: Sequence[str], wallet: Keypair | None = None, priority_fee: int = 0, program: Pubkey | None = None
) -> Chain:
    """A connection that gives up as soon as a person would. `program`'s errors get their names."""
    return Chain(rpc, wallet, program_id=program, priority_fee=priority_fee, patience=PATIENCE)


@dataclass(frozen=True, slots=True)
class RunChoice:
    """Which run a command is about, as typed: an address, or a name with what tells it apart."""

    rpc: Sequence[str]
    run: str
    program: str | None = None
    owner: str | None = None

    @contextlib.asynccontextmanager
    async def open(self, wallet: Keypair | None = None, priority_fee: int = 0) -> AsyncIterator[CoordinatorClient]:
        """A client of it. Raises RunNotFound, ConfigError."""
        program, owner = self._told_apart()
        options = {"priority_fee": priority_fee, "patience": PATIENCE}
        async with await open_run(self.rpc, self.run, wallet, program=program, owner=owner, **options) as client:
            yield client

    def _told_apart(self) -> tuple[Pubkey | None, Pubkey | None]:
        program = pubkey(self.program, "--program") if self.program else None
        return program, pubkey(self.owner, "--owner") if self.owner else None
