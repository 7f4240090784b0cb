"""`psyche-admin run evaluations`: the digests of evaluations that were recorded for a run."""

from __future__ import annotations

import typer

from coordinator.admin.output import show
from coordinator.admin.reading import Look, reading
from coordinator.evaluations import recorded_evaluations

app = typer.Typer()


@reading(app, "evaluations")
async def evaluations(one: Look) -> None:
    """List the evaluations that nodes have recorded: round, SHA-256 of the results, and who says so.

    `psyche-node eval --verify RESULTS.json` finds the one of a file.
    """
    async with one.open() as client:
        recorded = await recorded_evaluations(client, client.addresses.run)
        members = {member.wallet: member.slot for member in await client.members()}
    rows = [
        {"round": each.round, "sha256": each.digest.hex(), "wallet": str(each.wallet)}
        | {"member": members.get(each.wallet), "slot": each.slot, "signature": each.signature}
        for each in recorded
    ]
    lines = [
        f"round {row['round']}  {row['sha256']}  {row['wallet']} "
        f"({'no member' if row['member'] is None else 'member ' + str(row['member'])})"
        for row in rows
    ]
    show({"evaluations": rows}, one.as_json, "\n".join(lines) or "No evaluation was recorded.")
