"""Reading a run off the chain into the lines of a record, cross-checked against its accounts."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any, Final

from solders.pubkey import Pubkey

from coordinator.admin.grants_and_receipts import receipts_of
from coordinator.admin.record import FORMAT, Line
from coordinator.admin.replay import Replay
from coordinator.chain import ChainUnavailable
from coordinator.client import CoordinatorClient
from coordinator.history import Happening, HistoryIncomplete, happenings, signatures_of
from coordinator.snapshot import Snapshot, take_snapshot
from coordinator.state import Member, Receipt

# Until nothing happened between the two looks at a run that goes on.
_ATTEMPTS: Final = 50
_FIRST: Final = "RunCreated"


@dataclass(frozen=True, slots=True)
class Past:
    """A run's accounts and everything that the chain's history says happened before exactly that state. Events of an
    earlier run of the same name, which was closed, are not among them."""

    accounts: Snapshot
    receipts: tuple[Receipt, ...]
    events: tuple[Happening, ...]

    @property
    def complete(self) -> bool:
        """Whether the events begin with the run's first, and every round's with its start: version 1 of the program
        did not log that."""
        if not self.events or self.events[0].event.name != _FIRST:
            return False
        numbers = {
            name: {one.event.fields["round"] for one in self.events if one.event.name == name}
            for name in ("RoundStarted", "Committed", "RoundFinal")
        }
        return numbers["Committed"] | numbers["RoundFinal"] <= numbers["RoundStarted"]


async def read_past(client: CoordinatorClient, *, partial: bool) -> Past:
    """The run and its whole history.

    Args:
        partial: take what the endpoint has if it does not reach back to the run's beginning.

    Raises:
        HistoryIncomplete: it does not, or a transaction is missing on the way.
        ChainUnavailable: the run changes so fast that no consistent view was had.
    """
    run = client.addresses.run
    signatures = await signatures_of(client, run)
    for _ in range(_ATTEMPTS):
        before = await take_snapshot(client)
        signatures += await signatures_of(client, run, _last(signatures))
        after = await take_snapshot(client)
        # What landed after the first look is in the list, and would have changed the accounts or come since.
        if before.raw == after.raw and not await signatures_of(client, run, _last(signatures)):
            break
        await asyncio.sleep(client.slot_seconds / 4)
    else:
        raise ChainUnavailable(
            f"the run changed during {_ATTEMPTS} readings; try again, use a faster endpoint, or pause the run"
        )
    names = [name for name, succeeded in signatures if succeeded]
    events, gap = await happenings(client, client.program_id, run, names)
    births = [index for index, one in enumerate(events) if one.event.name == _FIRST]
    receipts = await receipts_of(client, client.program_id, run, before.run.created_slot)
    own = tuple(receipt for _, receipt in receipts)
    past = Past(before, own, tuple(events[births[-1] if births else 0 :]))
    if not past.complete and not partial:
        if gap is not None and not births:
            raise HistoryIncomplete(f"{gap}; use another endpoint, or --partial for what happened since")
        raise HistoryIncomplete(
            f"the endpoint's history of run {run} does not have every round's start; use an endpoint that has all of "
            "it, or, also for a run that version 1 of the program began, give --partial"
        )
    return past


def _last(signatures: list[tuple[str, bool]]) -> str | None:
    return signatures[-1][0] if signatures else None


def lines_of(past: Past, run: Pubkey, program: Pubkey, genesis: str) -> list[dict[str, Any]]:
    """The record without its signature.

    Raises:
        InvalidRecord: history and accounts contradict each other; an endpoint that lies, or a defect.
    """
    accounts = past.accounts
    lines: list[dict[str, Any]] = [
        {
            "kind": "run",
            "format": FORMAT,
            "run_id": accounts.run.run_id,
            "address": str(run),
            "program": str(program),
            "owner": str(accounts.run.owner),
            "genesis_hash": genesis,
            "complete": past.complete,
            "limits": asdict(accounts.run.limits),
            "terms": {
                key: value.hex() if isinstance(value, bytes) else value
                for key, value in asdict(accounts.run.terms).items()
            },
        }
    ]
    replay = Replay(complete=past.complete, most_tokens=most_tokens(lines[0], [one.event.name for one in past.events]))
    for happening in past.events:
        lines.append(event_line(happening))
        made_final = replay.see(Line(len(lines), lines[-1]))
        if made_final is not None:
            lines.append(made_final)
    lines += [_member_line(member) for member in accounts.members]
    lines += [_receipt_line(receipt) for receipt in past.receipts]
    lines.append(_state_line(accounts))
    return lines


def most_tokens(header: dict[str, Any], names: list[str]) -> int | None:
    """Tokens that a position can hold, where it has been the same for the whole run."""
    return None if "ModelChanged" in names else int(header["terms"]["sequence_length"])


def event_line(happening: Happening) -> dict[str, Any]:
    return {
        "kind": "event",
        "slot": happening.slot,
        "signature": happening.signature,
        "index": happening.index,
        "name": happening.event.name,
        # An event's own slot is the transaction's.
        **{key: value for key, value in happening.event.fields.items() if key != "slot"},
    }


def _member_line(member: Member) -> dict[str, Any]:
    return {
        "kind": "member",
        "member": member.slot,
        "wallet": str(member.wallet),
        "node_key": member.node_key.hex(),
        "status": member.status.name,
        "credit": member.credit,
        "updates_included": member.updates_included,
        "reward": member.reward,
        "reward_claimed": member.reward_claimed,
    }


def _receipt_line(receipt: Receipt) -> dict[str, Any]:
    return {
        "kind": "receipt",
        "wallet": str(receipt.wallet),
        "credit": receipt.credit,
        "updates_included": receipt.updates_included,
        "reward": receipt.reward,
        "reward_claimed": receipt.reward_claimed,
        "archived_slot": receipt.archived_slot,
    }


def _state_line(accounts: Snapshot) -> dict[str, Any]:
    run = accounts.run
    return {
        "kind": "state",
        "slot": accounts.slot,
        "state": run.phase.name,
        "round": run.round,
        "final_rounds": run.final_rounds,
        "epoch": run.epoch,
        "cursor": run.cursor,
        "requeued": accounts.header.requeued,
        "tokens": run.tokens,
        "archived_credit": accounts.membership.archived_credit,
        "checkpoint_round": run.checkpoint_round,
        "checkpoint_root": run.checkpoint_root.hex(),
        "reward_earned": run.reward_earned,
        "reward_paid": run.reward_paid,
    }
