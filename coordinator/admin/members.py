"""`psyche-admin member`: what a member's wallet does in a run besides training."""

from __future__ import annotations

from typing import Annotated

import typer
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.admin.acting import Act, acting
from coordinator.admin.grants_and_receipts import receipts_of
from coordinator.client import CoordinatorClient
from coordinator.funds import sol
from coordinator.run_config import ConfigError
from coordinator.state import Member, Receipt

app = typer.Typer(help="What a member's wallet does in a run besides training.", no_args_is_help=True)

# What fits into one transaction beside the rest; the command can be repeated.
_MOST_RECEIPTS = 8


@acting(app, "claim")
async def claim(one: Act) -> None:
    """Have the rewards paid that the wallet has earned: in its slot, and in receipts for slots that it had before."""
    own = _own(await one.client.members(), one.me)
    receipts = [found for found in await _receipts(one.client, one.me) if found[1].reward_claimed < found[1].reward]
    made, owed = [], 0
    if own is not None and own.reward_claimed < own.reward:
        made.append(ix.claim(*one.of_run))
        owed += own.reward - own.reward_claimed
    for address, receipt in receipts[:_MOST_RECEIPTS]:
        made.append(ix.claim(*one.of_run, address))
        owed += receipt.reward - receipt.reward_claimed
    if not made:
        raise ConfigError(f"{one.me} has nothing to claim in this run")
    await one.send(
        f"claim {sol(owed)} SOL", *made, done=f"rewards of up to {sol(owed)} SOL are paid", result={"owed": owed}
    )


@acting(app, "share")
async def share(
    one: Act,
    share: Annotated[int, typer.Argument(min=1, help="Share of the batch, compared with the other members'.")],
) -> None:
    """Ask for another share of the batch, from the next round on."""
    await one.send(
        f"set the share to {share}",
        ix.set_share(*one.of_run, share),
        done=f"share {share:,} from the next round on",
        result={"share": share},
    )


@acting(app, "leave")
async def leave(one: Act) -> None:
    """Leave the run. Credit stays, and so does an update that is already committed."""
    await one.send("leave the run", ix.leave(*one.of_run), done=f"{one.me} has left")


@acting(app, "archive")
async def archive(
    one: Act,
    slot: Annotated[
        int, typer.Argument(min=0, max=255, help="Number of a member that has left, was dropped or ejected.")
    ],
) -> None:
    """Make room in a full run: move the credit of a member that is gone into a receipt. Anyone may; the payer deposits
    for the receipt."""
    gone = next((member for member in await one.client.members() if member.slot == slot), None)
    if gone is None:
        raise ConfigError(f"slot {slot} is empty already")
    await one.client.load_rent()
    at = await one.client.slot()
    made = ix.archive(*one.of_run, slot, gone.wallet, at, one.client.rent_exempt)
    await one.send(
        f"archive member {slot}",
        *made,
        done=f"slot {slot} is free; {gone.wallet} has {gone.credit:,} tokens of credit in a receipt",
        result={"slot": slot, "wallet": str(gone.wallet), "credit": gone.credit},
    )


@acting(app, "restore")
async def restore(one: Act) -> None:
    """Move the credit of the wallet's receipts back into its present slot; their deposits go to who paid them."""
    receipts = (await _receipts(one.client, one.me))[:_MOST_RECEIPTS]
    if not receipts:
        raise ConfigError(f"{one.me} has no receipts in this run")
    credit = sum(receipt.credit for _, receipt in receipts)
    await one.send(
        f"restore {len(receipts)} receipts",
        *(ix.restore(*one.of_run, address, receipt.payer) for address, receipt in receipts),
        done=f"{credit:,} tokens of credit are back",
        result={"receipts": len(receipts), "credit": credit},
    )


def _own(members: tuple[Member, ...], wallet: Pubkey) -> Member | None:
    return next((member for member in members if member.wallet == wallet), None)


async def _receipts(client: CoordinatorClient, wallet: Pubkey) -> list[tuple[Pubkey, Receipt]]:
    """The wallet's receipts in the run, oldest first."""
    created = (await client.pulse()).run.created_slot
    found = await receipts_of(client, client.program_id, client.addresses.run, created)
    return [one for one in found if one[1].wallet == wallet]
