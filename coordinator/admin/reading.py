"""Commands that look at one run and send nothing: the options that all have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import typer

from coordinator.admin.options import RPC_DEFAULT, AsJson, OwnerAddress, ProgramAddress, Rpc, RunName
from coordinator.admin.registering import Command, parameters, register
from coordinator.admin.session import RunChoice
from coordinator.client import CoordinatorClient


@dataclass(frozen=True, slots=True)
class Look:
    """What was typed: which run, and how to print."""

    choice: RunChoice
    as_json: bool

    @property
    def rpc(self) -> Sequence[str]:
        return self.choice.rpc

    def open(self) -> contextlib.AbstractAsyncContextManager[CoordinatorClient]:
        """The run's client. Raises RunNotFound, ConfigError, ChainUnavailable."""
        return self.choice.open()


def _common(
    run: RunName,
    rpc: Rpc = RPC_DEFAULT,
    program: ProgramAddress = None,
    owner: OwnerAddress = None,
    as_json: AsJson = False,
) -> Look:
    """The options of every command that looks at a run."""
    return Look(RunChoice(rpc, run, program, owner), as_json)


_COMMON: Final = parameters(_common)


def reading(app: typer.Typer, name: str) -> Callable[[Command], Command]:
    """Register `async def command(one: Look, ...)` under `name`; its own parameters follow RUN."""

    def decorate(command: Command) -> Command:
        async def start(shared: dict[str, Any], own: dict[str, Any]) -> None:
            await command(_common(**shared), **own)

        return register(app, name, command, _COMMON, start)

    return decorate
