"""`psyche-admin auth`: who may join a run that has a join authority."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

from coordinator import instructions as ix
from coordinator.addresses import grant_address
from coordinator.admin.acting import Act, acting
from coordinator.admin.grants_and_receipts import grants_of
from coordinator.admin.output import address_of, console
from coordinator.admin.reading import Look, reading
from coordinator.chain import Account
from coordinator.layout import GRANT, GRANT_SIZE
from coordinator.run_config import ConfigError
from coordinator.state import Grant

app = typer.Typer(help="Who may join a run that has a join authority.", no_args_is_help=True)

Grantee = Annotated[
    str | None, typer.Argument(help="Wallet that may join: an address or a wallet file. Or give --anyone.")
]
Anyone = Annotated[bool, typer.Option("--anyone", help="Whoever wants to may join, until it is revoked.")]


@acting(app, "grant")
async def grant(
    one: Act,
    grantee: Grantee = None,
    anyone: Anyone = False,
) -> None:
    """Let a wallet join (or anyone). Signed by the run's join authority, which pays a deposit for it."""
    key = _grantee(grantee, anyone)
    if (await one.client.pulse()).run.join_authority is None:
        raise ConfigError(
            "anyone may join this run: it has no join authority. Give it one first: psyche-admin run set RUN "
            "join_authority=ADDRESS"
        )
    address = grant_address(one.client.program_id, one.me, one.client.addresses.run, key or Pubkey.default())
    who = key or "anyone"
    there, held = await one.client.account(address, (0, GRANT_SIZE)), 0
    if there is not None and there.owner == SYSTEM_PROGRAM and not there.data:
        held = there.lamports  # somebody's attempt to block the address
    elif there is not None:
        await _refuse_taken(one, address, there, str(who))
    await one.client.load_rent()
    made = ix.authorize(*one.of_run, key, one.client.rent_exempt, held)
    await one.send(
        f"let {who} join",
        *made,
        done=f"{who} may join [dim](grant {address})[/dim]",
        result={"grant": str(address), "grantee": None if key is None else str(key)},
    )


@acting(app, "revoke", asks=True)
async def revoke(
    one: Act,
    grantee: Grantee = None,
    anyone: Anyone = False,
    eject: Annotated[bool, typer.Option("--eject", help="Put out the members that joined under it, too.")] = False,
) -> None:
    """Take a grant back; its deposit returns. Members that joined under it stay, unless --eject puts them out."""
    key = _grantee(grantee, anyone)
    address = grant_address(one.client.program_id, one.me, one.client.addresses.run, key or Pubkey.default())
    there = await one.client.account(address, (0, 0))
    if there is None or there.owner != one.client.program_id:
        raise ConfigError(
            f"{one.me} has granted {key or 'anyone'} nothing in this run; who may join by which grant: psyche-admin "
            "auth list RUN"
        )
    out = [member for member in await one.client.members() if member.live and member.grant == address]
    caution = f"{len(out)} members are put out, and their work in open rounds is lost." if eject else None
    await one.send(
        f"revoke the grant to {key or 'anyone'}",
        ix.revoke(*one.of_run, address, eject=eject),
        done=f"{key or 'anyone'} may join no more" + (f"; {len(out)} members are out" if eject else ""),
        caution=caution,
        result={"grant": str(address), "ejected": len(out) if eject else 0},
    )


@acting(app, "delegate")
async def delegate(
    one: Act,
    key: Annotated[str, typer.Argument(help="Wallet of another machine: an address or a wallet file.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take it back.")] = False,
) -> None:
    """Let the wallet of another machine of yours join under your grant, or --remove it. Signed by the grantee."""
    other = address_of(key, "the delegate")
    authority = (await one.client.pulse()).run.join_authority
    if authority is None:
        raise ConfigError("anyone may join this run: it has no join authority, so nothing is to be delegated")
    address = grant_address(one.client.program_id, authority, one.client.addresses.run, one.me)
    await one.send(
        f"{'remove' if remove else 'add'} delegate {other}",
        ix.delegate(*one.of_run, address, other, remove=remove),
        done=f"{other} may join no more" if remove else f"{other} may join under the grant to {one.me}",
        result={"grant": str(address), "delegate": str(other), "removed": remove},
    )


@reading(app, "list")
async def list_grants(one: Look) -> None:
    """List a run's join authority and grants."""
    async with one.open() as client:
        run_now = (await client.pulse()).run
        authority = run_now.join_authority
        grants = await grants_of(client, client.program_id, client.addresses.run, run_now.created_slot)
    if one.as_json:
        shape = {
            "join_authority": None if authority is None else str(authority),
            "grants": [_json(address, grant, authority) for address, grant in grants],
        }
        print(json.dumps(shape))
        return
    print(f"join authority: {authority or 'none, anyone may join'}")
    if grants:
        console().print(_table(grants, authority))


async def _refuse_taken(one: Act, address: Pubkey, there: Account, who: str) -> None:
    """Say why there is no room for a grant. Raises ConfigError, always."""
    run = one.client.addresses.run
    if there.owner != one.client.program_id or len(there.data) < GRANT_SIZE:
        raise ConfigError(f"address {address}, where the grant would be, is taken by an account of {there.owner}")
    if GRANT.get(there.data, "run_slot") == (await one.client.pulse()).run.created_slot:
        raise ConfigError(f"{who} may join already, by grant {address}")
    raise ConfigError(
        f"a grant to {who} for an earlier run of this name is in the way; first get its deposit back: "
        f"psyche-admin run reclaim {run} --program {one.client.program_id}"
    )


def _grantee(grantee: str | None, anyone: bool) -> Pubkey | None:
    if (grantee is None) == (not anyone):
        raise typer.BadParameter("give either a wallet or --anyone")
    return None if grantee is None else address_of(grantee, "the grantee")


def _json(address: Pubkey, grant: Grant, authority: Pubkey | None) -> dict[str, object]:
    return {
        "address": str(address),
        "grantee": None if grant.grantee is None else str(grant.grantee),
        "authority": str(grant.authority),
        "in_force": grant.authority == authority,
        "delegates": [str(key) for key in grant.delegates],
        "created_slot": grant.created_slot,
    }


def _table(grants: list[tuple[Pubkey, Grant]], authority: Pubkey | None) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("may join", "in force", "since slot"):
        table.add_column(name, overflow="fold", justify="right" if name == "since slot" else "left")
    for _, grant in grants:
        who = "[bold]anyone[/bold]" if grant.grantee is None else f"[bold]{grant.grantee}[/bold]"
        who += "".join(f"\n[dim]and {key}[/dim]" for key in grant.delegates)
        force = "[green]yes[/green]" if grant.authority == authority else f"[red]no: of {grant.authority}[/red]"
        table.add_row(who, force, f"{grant.created_slot:,}")
    return table
