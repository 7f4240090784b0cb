"""`psyche-admin run evaluations`: the digests of evaluations that were recorded for a run."""

from __future__ import annotations

import typer

from coordinator.admin.options import RPC_DEFAULT, AsJson, OwnerAddress, ProgramAddress, Rpc, RunName
from coordinator.admin.output import show
from coordinator.admin.session import RunChoice, go
from coordinator.evaluations import recorded_evaluations

app = typer.Typer()


@app.command("evaluations")
def evaluations(
    run: RunName,
    rpc: Rpc = RPC_DEFAULT,
    program: ProgramAddress = None,
    owner: OwnerAddress = None,
    as_json: AsJson = False,
) -> None:
    """List the evaluations that nodes have recorded: round, SHA-256 of the results, and who says so.

    `psyche-node eval --verify RESULTS.json` finds the one of a file.
    """

    async def act() -> None:
        async with RunChoice(rpc, run, program, owner).open() as client:
            recorded = await recorded_evaluations(client, client.addresses.run)
            members = {member.wallet: member.slot for member in await client.members()}
        rows = [
            {"round": one.round, "sha256": one.digest.hex(), "wallet": str(one.wallet)}
            | {"member": members.get(one.wallet), "slot": one.slot, "signature": one.signature}
            for one in recorded
        ]
        lines = [
            f"round {row['round']}  {row['sha256']}  {row['wallet']} "
            f"({'no member' if row['member'] is None else 'member ' + str(row['member'])})"
            for row in rows
        ]
        show({"evaluations": rows}, as_json, "\n".join(lines) or "No evaluation was recorded.")

    go(act())
