"""`psyche-admin run`: what only the owner of a run can do with it."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.markup import escape
from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from coordinator import instructions as ix
from coordinator.addresses import RunAddresses
from coordinator.admin.acting import Act, acting, key_of
from coordinator.admin.changes import change_of
from coordinator.admin.options import (
    RPC_DEFAULT,
    AsJson,
    DryRun,
    Payer,
    PriorityFee,
    Rpc,
    Yes,
)
from coordinator.admin.output import lamports_of, pubkey
from coordinator.admin.sending import Manner, Step, carry_out
from coordinator.admin.session import chain_at, go
from coordinator.chain import Chain
from coordinator.client import RunNotFound
from coordinator.funds import sol
from coordinator.layout import GRANT, GRANT_MARK, RECEIPT, RECEIPT_MARK, RUN, RUN_MARK, RUN_SIZE
from coordinator.printable import printable
from coordinator.run_config import ConfigError
from coordinator.state import Phase
from coordinator.wallet import load_keypair

app = typer.Typer()

_IDLE: Final = (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP, Phase.PAUSED)
# What fits into one transaction.
_MOST_RECORDS: Final = 16


@acting(app, "set", asks=True)
async def set_config(
    one: Act,
    changes: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="e.g. batch=64, reward_rate=1000, terms.peak_lr=0.001."),
    ],
) -> None:
    """Change settings of a run that has begun.

    Limits (batch, max_members, ...) hold from the next round on. join_authority (an address, or "anyone") and
    reward_rate (lamports per million tokens) hold at once. terms.* (model, data, optimizer) can only be changed while
    the run waits for members or is paused. The run goes on from its last checkpoint, or from the model named; the
    learning-rate schedule begins again; all members have to start their nodes again, with that model.
    """
    pulse = await one.client.pulse()
    change = change_of(pulse.run, changes)
    made = []
    if change.limits is not None:
        made.append(ix.set_config(*one.of_run, change.limits, change.join_authority))
    if change.terms is not None:  # behind the limits: the schedule spans the rounds that are left by them
        made.append(ix.set_model(*one.of_run, change.terms))
    if change.reward_rate is not None:
        made.append(ix.set_reward_rate(*one.of_run, change.reward_rate))
    text = "\n".join(f"  {escape(printable(line))}" for line in change.text(pulse.run))
    await one.send(
        "change " + ", ".join(change.keys),
        *made,
        done=f"changed:\n{text}\n",
        caution=change.caution(pulse.run),
        result={"changed": change.to_json(pulse.run), "checkpoint_round": change.checkpoint(pulse.run)},
    )


@acting(app, "pause")
async def pause(one: Act) -> None:
    """Pause a run: the round in flight ends and its checkpoint is agreed first, nothing is discarded, members stay."""
    idle = (await one.client.pulse()).run.phase in _IDLE
    await one.send(
        "pause the run",
        ix.pause(*one.of_run),
        *_tick(one, idle),
        done="the run is paused" if idle else "the run pauses when its round is final",
    )


@acting(app, "resume")
async def resume(one: Act) -> None:
    """Let a paused run go on, or take back a pause that has not come about yet."""
    await one.send("resume the run", ix.resume(*one.of_run), done="the run goes on")


@acting(app, "finish", asks=True)
async def finish(one: Act) -> None:
    """End a run for good, once the round in flight is final and its checkpoint agreed."""
    left = (await one.client.pulse()).run
    await one.send(
        "finish the run",
        ix.finish(*one.of_run),
        *_tick(one, left.phase in _IDLE),
        done="the run is finished" if left.phase in _IDLE else "the run ends when its round is final",
        caution=f"Run {left.run_id!r} ends for good after round {left.round:,} of {left.limits.total_rounds:,}.",
    )


@acting(app, "tick")
async def tick(one: Act) -> None:
    """Make the transition that is due. Nodes do it; this is for a run that has no living node any more."""
    await one.send("make the transition that is due", ix.tick(*one.of_run), done="the transition is made")


def _tick(one: Act, idle: bool) -> list[Instruction]:
    """Nothing is in flight, so what the owner asks for is due at once, and no node need be there to bring it about."""
    return [ix.tick(*one.of_run)] if idle else []


@acting(app, "kick", asks=True)
async def kick(
    one: Act,
    member: Annotated[str, typer.Argument(help="Member: its wallet's address, a wallet file, or its number.")],
) -> None:
    """Put a member out at once. What it has committed in open rounds does not count; it may join again."""
    wallet = await one.wallet_of(member)
    await one.send(
        f"kick {wallet}",
        ix.kick(*one.of_run, wallet),
        done=f"{wallet} is out; it may join again",
        caution=f"Member {wallet} is put out, and its work in rounds that are not final is lost.",
        result={"wallet": str(wallet)},
    )


@acting(app, "ban", asks=True)
async def ban(
    one: Act,
    key: Annotated[
        str, typer.Argument(help="Wallet (address or file), node key (12D3Koo... or hex) or grantee to keep out.")
    ],
    lift: Annotated[bool, typer.Option("--lift", help="Take a ban back.")] = False,
) -> None:
    """Keep a key out of the run, as a wallet, as a node key or as a grantee, and put out the member that has it."""
    banned = key_of(key)
    await one.send(
        f"{'lift the ban of' if lift else 'ban'} {banned}",
        ix.ban(*one.of_run, banned, lift=lift),
        done=f"{banned} may join again" if lift else f"{banned} is banned",
        caution=None if lift else f"Who has key {banned} is put out, and its work in open rounds is lost.",
        result={"key": str(banned), "banned": not lift},
    )


@acting(app, "fund", asks=True)
async def fund(
    one: Act,
    amount: Annotated[str, typer.Argument(help="SOL, up to 9 decimals.")],
) -> None:
    """Put lamports into the run, for rewards. Anyone may; what is left goes to the owner when the run is closed."""
    lamports = lamports_of(amount)
    to = one.client.addresses.run
    made = transfer(TransferParams(from_pubkey=one.me, to_pubkey=to, lamports=lamports))
    await one.send(
        f"put {sol(lamports)} SOL into the run",
        made,
        done=f"the run has {sol(lamports)} SOL more for rewards",
        caution=f"{sol(lamports)} SOL are for the run's members; what is left goes to its owner in the end.",
        result={"funded": lamports},
    )


@acting(app, "close", asks=True)
async def close(one: Act) -> None:
    """Delete a finished run's accounts; their deposits and what is left for rewards go to the owner."""
    run_account = (await one.client.pulse()).run
    owed = run_account.reward_earned - run_account.reward_paid
    lost = f" {sol(owed)} SOL of rewards that nobody claimed are lost to the members." if owed > 0 else ""
    await one.send(
        "close the run",
        ix.close_run(*one.of_run),
        done=f"run {escape(printable(run_account.run_id))} is closed",
        caution=f"Run {run_account.run_id!r} is deleted: members, credit, checkpoints and all. "
        f"`run export` keeps a record.{lost}",
    )


@app.command("migrate")
def migrate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Address of the run's account.")],
    payer: Payer,
    rpc: Rpc = RPC_DEFAULT,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """After an upgrade of the program: bring a run's accounts to the new version. The run goes on."""

    async def act() -> None:
        wallet = load_keypair(payer)
        address = pubkey(run, "the run")
        async with chain_at(rpc) as chain:
            account = await chain.account(address, (0, RUN_SIZE))
        if account is None or len(account.data) < RUN_SIZE or account.data[:8] != RUN_MARK:
            raise RunNotFound(f"there is no run at {address}")
        # The accounts' places are the same in every version.
        members, rounds = (Pubkey.from_bytes(RUN.get(account.data, name)) for name in ("members", "rounds"))
        made = ix.migrate(RunAddresses(address, members, rounds), account.owner, wallet.pubkey())
        manner = Manner(wallet, account.owner, dry_run, yes, as_json, priority_fee)
        async with chain_at(rpc, wallet, priority_fee, account.owner) as chain:
            step = Step("migrate the run's accounts", [made])
            await carry_out(
                chain,
                manner,
                step,
                {"run": str(address)},
                f"run {address} is migrated",
                f"The accounts of run {address} become those of another version, for everybody in it; software of the "
                "version before cannot read them any more.",
            )

    go(act())


@app.command("reclaim")
def reclaim(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Address that the closed run had.")],
    program: Annotated[str, typer.Option(help="Address of the coordinator program.")],
    payer: Payer,
    rpc: Rpc = RPC_DEFAULT,
    priority_fee: PriorityFee = 0,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """After a run was closed: get back the deposits of grants and receipts that the wallet has paid."""

    async def act() -> None:
        wallet = load_keypair(payer)
        address, program_id = pubkey(run, "the run"), pubkey(program, "--program")
        async with chain_at(rpc, wallet, priority_fee, program_id) as chain:
            paid = await _paid_by(chain, program_id, address, wallet.pubkey())
            if not paid:
                raise ConfigError(f"{wallet.pubkey()} has paid no grant or receipt of run {address} that is left")
            now = paid[:_MOST_RECORDS]
            manner = Manner(wallet, program_id, dry_run, False, as_json, priority_fee)
            step = Step(
                f"reclaim {len(now)} deposits", [ix.reclaim(address, program_id, wallet.pubkey(), one) for one in now]
            )
            result = {"run": str(address), "reclaimed": len(now), "left": len(paid) - len(now)}
            rest = f"; {len(paid) - len(now)} are left: run it again" if len(paid) > len(now) else ""
            await carry_out(chain, manner, step, result, f"{len(now)} deposits are back{rest}")

    go(act())


async def _paid_by(chain: Chain, program: Pubkey, run: Pubkey, wallet: Pubkey) -> list[Pubkey]:
    """Grants and receipts of a run, whichever of its name, whose deposit is the wallet's."""
    paid = []
    for record, mark, payer in ((GRANT, GRANT_MARK, "authority"), (RECEIPT, RECEIPT_MARK, "payer")):
        for address, account in await chain.program_accounts(program, mark, (0, record.size)):
            if len(account.data) < record.size:
                continue
            if record.get(account.data, "run") == bytes(run) and record.get(account.data, payer) == bytes(wallet):
                paid.append(address)
    return paid
