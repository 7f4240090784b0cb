"""Whether a record is consistent with itself, and with the chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from coordinator.admin.exporting import Past, event_line, lines_of, most_tokens
from coordinator.admin.record import InvalidRecord, Line, Record
from coordinator.admin.replay import Replay
from coordinator.client import CoordinatorClient

_ORDER = ("run", "event", "member", "receipt", "state")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a consistent record amounts to."""

    run_id: str
    address: str
    complete: bool
    events: int
    rounds: int
    members: int
    tokens: int


def check_consistency(record: Record) -> Checked:
    """Tell the run again from the record's events and compare.

    Every commitment belongs to an assigned slice, every inclusion set lies within the commitments, every position is
    assigned once until it comes back, tokens and credit are conserved, and the accounts at the end follow from the
    events.

    Raises:
        InvalidRecord: with the first line that cannot be.
    """
    header, *rest = record.lines
    complete = header["complete"] is True
    names = [str(line["name"]) for line in rest if line["kind"] == "event"]
    try:
        bound = most_tokens(header.value, names)
    except (TypeError, KeyError, ValueError):
        raise InvalidRecord("line 1: terms has no sequence_length") from None
    replay = Replay(complete=complete, most_tokens=bound)
    expected: dict[str, object] | None = None
    last_slot, stage = 0, 0
    members, receipts = list[Line](), list[Line]()
    state: Line | None = None
    for line in rest:
        kind = line["kind"]
        if expected is not None or kind == "round":
            if line.value != expected:
                _refuse(line, "this is not the round that follows from the events before it")
            expected = None
            continue
        if kind not in _ORDER[1:] or _ORDER.index(kind) < stage or state is not None:
            _refuse(line, f"a line of kind {kind!r} does not belong here")
        stage = _ORDER.index(kind)
        if kind == "event":
            if line.integer("slot") < last_slot:
                _refuse(line, f"slot {line['slot']} comes after slot {last_slot}")
            last_slot = line.integer("slot")
            expected = replay.see(line)
        elif kind == "state":
            state = line
        else:
            (members if kind == "member" else receipts).append(line)
    if expected is not None or state is None:
        raise InvalidRecord(f"the record ends after line {len(record.lines)}, without the run's state")
    _check_end(replay, complete, members, receipts, state)
    return Checked(
        str(header["run_id"]),
        str(header["address"]),
        complete,
        len(names),
        replay.rounds,
        len(members),
        state.integer("tokens"),
    )


def _check_end(replay: Replay, complete: bool, members: list[Line], receipts: list[Line], state: Line) -> None:
    credit = sum(line.integer("credit") for line in members)
    archived = sum(line.integer("credit") for line in receipts)
    if archived != state.integer("archived_credit"):
        _refuse(state, f"receipts hold {archived} tokens of credit, the account counts {state['archived_credit']}")
    if credit + archived != state.integer("tokens"):
        _refuse(
            state, f"members and receipts have credit for {credit + archived} tokens, the run counts {state['tokens']}"
        )
    if replay.roots and (root := replay.roots.get(state.integer("checkpoint_round"))) not in (
        None,
        state["checkpoint_root"],
    ):
        _refuse(state, f"the checkpoint agreed before round {state['checkpoint_round']} was {root}")
    if not complete:
        return
    for line in members:
        slot = line.integer("member")
        if line.integer("credit") != replay.credit[slot]:
            _refuse(line, f"credit {line['credit']}, its included updates have {replay.credit[slot]}")
        if line["wallet"] != replay.wallets.get(slot):
            _refuse(line, f"wallet {line['wallet']}, joined was {replay.wallets.get(slot)}")
    for what, found, told in (
        ("tokens", state.integer("tokens"), replay.tokens),
        ("archived_credit", state.integer("archived_credit"), replay.archived_credit),
        ("final rounds", state.integer("final_rounds"), replay.rounds),
    ):
        if found != told:
            _refuse(state, f"{what}: the account has {found}, the events make {told}")


async def check_against_chain(record: Record, client: CoordinatorClient, past: Past, genesis: str) -> int:
    """Compare with the chain's own history; how many events have happened since.

    Raises:
        InvalidRecord: the chain says otherwise.
    """
    header = record.lines[0]
    here = (str(client.addresses.run), str(client.program_id), str(past.accounts.run.owner), genesis)
    for key, value in zip(("address", "program", "owner", "genesis_hash"), here, strict=True):
        if header[key] != value:
            _refuse(header, f"{key} is {header[key]}, on this chain it is {value}")
    told = [line for line in record.lines if line["kind"] == "event"]
    known = [event_line(one) for one in past.events]
    if not header["complete"]:
        first = told[0].value["signature"] if told else None
        known = known[next((i for i, one in enumerate(known) if one["signature"] == first), 0) :]
    for line, there in zip(told, known, strict=False):
        if line.value != there:
            _refuse(line, f"the chain has {there['name']} of transaction {there['signature']} here, with other values")
    if len(told) > len(known):
        _refuse(told[len(known)], "the chain does not have this event")
    if len(told) == len(known):
        _check_accounts(record, client, past, genesis)
    return len(known) - len(told)


def _check_accounts(record: Record, client: CoordinatorClient, past: Past, genesis: str) -> None:
    """Nothing has happened since: the accounts must be the same, too."""
    kinds = ("member", "receipt", "state")
    theirs = [line for line in record.lines if line["kind"] in kinds]
    ours = [one for one in lines_of(past, client.addresses.run, client.program_id, genesis) if one["kind"] in kinds]
    if len(theirs) != len(ours):
        raise InvalidRecord(f"the record has {len(theirs)} accounts of members and receipts, the chain {len(ours)}")
    for line, one in zip(theirs, ours, strict=True):
        # Claims and changes of shares log nothing, or nothing that moves these; the slot is when it was looked at.
        differing = [
            key
            for key in one
            if key not in ("slot", "reward_claimed", "reward_paid", "node_key", "status")
            and one[key] != line.value.get(key)
        ]
        if differing:
            _refuse(line, f"{differing[0]} is {line.value.get(differing[0])}, on the chain it is {one[differing[0]]}")


def _refuse(line: Line, text: str) -> NoReturn:
    raise InvalidRecord(f"line {line.number}: {text}")
