"""The command line: groups of commands, each in its own module."""

from __future__ import annotations

import typer

from coordinator.admin import keys, ledgers, programs, runs

app = typer.Typer(
    name="psyche-admin",
    help="Deploy the coordinator program, own and watch runs, manage wallets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
app.add_typer(keys.app, name="keys")
app.add_typer(ledgers.app, name="ledger")
app.add_typer(programs.app, name="program")
app.add_typer(runs.app, name="run")


def main() -> None:
    app()
