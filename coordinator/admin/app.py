"""The command line: groups of commands, each module its own part."""

from __future__ import annotations

import typer

from coordinator.admin import auth, evaluations, keys, ledgers, members, programs, records, runs, steering, watching
from coordinator.pipes import end_with_reader

app = typer.Typer(
    name="psyche-admin",
    help="Deploy the coordinator program, own and watch runs, manage wallets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
run_app = typer.Typer(help="Runs: create, watch, steer, export and close them.", no_args_is_help=True)
for part in (runs, watching, steering, records, evaluations):
    run_app.add_typer(part.app)
app.add_typer(keys.app, name="keys")
app.add_typer(ledgers.app, name="ledger")
app.add_typer(programs.app, name="program")
app.add_typer(run_app, name="run")
app.add_typer(auth.app, name="auth")
app.add_typer(members.app, name="member")


def main() -> None:
    end_with_reader(app)
