"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_RPC: Final = "http://127.0.0.1:8899"
RPC_DEFAULT: Final = [DEFAULT_RPC]

Rpc = Annotated[
    list[str], typer.Option("--rpc", help="RPC endpoint; give it several times for fail-over.", show_default=True)
]
Payer = Annotated[Path, typer.Option("--payer", help="Wallet file that signs and pays.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PriorityFee = Annotated[int, typer.Option(min=0, help="Micro-lamports per compute unit, for a busy cluster.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be sent and what it costs, simulate it, and send nothing.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before what cannot be undone.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Address of the run's account, or its name.")]
ProgramAddress = Annotated[
    str | None, typer.Option("--program", help="Address of the coordinator program, where RUN is a name.")
]
OwnerAddress = Annotated[
    str | None, typer.Option("--owner", help="Owner's wallet, where several have a run of that name.")
]
