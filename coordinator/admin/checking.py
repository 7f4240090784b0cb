"""Whether a record is consistent with itself, and with the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.admin.exporting import Past, event_line, lines_of, most_tokens
from coordinator.admin.record import InvalidRecord, Line, Record
from coordinator.admin.replay import Replay
from coordinator.history import Happening

_ORDER: Final = ("run", "event", "member", "receipt", "state")
# They move without an event: the slot is when it was looked at, and the owner's requests log nothing.
_UNLOGGED: Final = frozenset({"slot", "requeued"})


@dataclass(frozen=True, slots=True)
class Checked:
    """What a consistent record amounts to."""

    run_id: str
    address: Pubkey
    program: Pubkey
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
    _check_address(header)
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
        Pubkey.from_string(header["address"]),
        Pubkey.from_string(header["program"]),
        complete,
        len(names),
        replay.rounds,
        len(members),
        state.integer("tokens"),
    )


def _check_address(header: Line) -> None:
    """Address, program, owner and name belong together: nobody can put a name on another run."""
    try:
        program, owner = Pubkey.from_string(header["program"]), Pubkey.from_string(header["owner"])
        address = str(run_addresses(program, owner, str(header["run_id"])).run)
    except (TypeError, ValueError) as error:
        raise InvalidRecord(f"line {header.number}: program, owner or run_id cannot be: {error}") from None
    if header["address"] != address:
        _refuse(header, f"run {header['run_id']!r} of {owner} would be at {address}, not at {header['address']}")


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


def compare_events(record: Record, history: Sequence[Happening], genesis: str) -> int:
    """Compare with the events that the chain has under the run's address; how many have happened since.

    Raises:
        InvalidRecord: the chain says otherwise.
    """
    header = record.lines[0]
    if header["genesis_hash"] != genesis:
        _refuse(header, f"it is of the chain with genesis hash {header['genesis_hash']}, this one has {genesis}")
    told = [line for line in record.lines if line["kind"] == "event"]
    if not told:
        return len(history)
    # An earlier run of this name, since closed, has the same address: begin where the record does.
    begins = [index for index, one in enumerate(history) if one.signature == told[0]["signature"]]
    known = [event_line(one) for one in history[begins[0] :]] if begins else []
    for line, there in zip(told, known, strict=False):
        if line.value != there:
            _refuse(line, f"the chain has {there['name']} of transaction {there['signature']} here, with other values")
    if len(told) > len(known):
        _refuse(told[len(known)], "the chain does not have this event")
    return len(known) - len(told)


def compare_accounts(record: Record, past: Past, run: Pubkey, program: Pubkey, genesis: str) -> None:
    """Compare with the accounts, if nothing has happened since. Raises InvalidRecord."""
    kinds = ("member", "receipt", "state")
    theirs = [line for line in record.lines if line["kind"] in kinds]
    ours = [one for one in lines_of(past, run, program, genesis) if one["kind"] in kinds]
    if len(theirs) != len(ours):
        raise InvalidRecord(f"the record has {len(theirs)} accounts of members and receipts, the chain {len(ours)}")
    for line, one in zip(theirs, ours, strict=True):
        differing = [key for key in one if key not in _UNLOGGED and one[key] != line.value.get(key)]
        if differing:
            _refuse(line, f"{differing[0]} is {line.value.get(differing[0])}, on the chain it is {one[differing[0]]}")


def _refuse(line: Line, text: str) -> NoReturn:
    raise InvalidRecord(f"line {line.number}: {text}")
