"""Whether a record is consistent with itself, and with the chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.admin.exporting import Past, event_line, lines_of, most_tokens
from coordinator.admin.record import InvalidRecord, Line, Record
from coordinator.admin.replay import Archived, Replay
from coordinator.history import Happening, HistoryIncomplete
from coordinator.values import Phase

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
    assigned once until it comes back, tokens and credit are conserved. Of a complete record the accounts at the end
    follow from the events: who is a member and has which receipts, credit and number of updates, the run's state,
    round, epoch, place in the data and checkpoint. Members' statuses and all that begins with `reward` do not: only the
    chain knows whether those are right.

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
    _check_end(replay, header, members, receipts, state)
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


def _check_end(replay: Replay, header: Line, members: list[Line], receipts: list[Line], state: Line) -> None:
    credit = sum(line.integer("credit") for line in members)
    archived = sum(line.integer("credit") for line in receipts)
    if archived != state.integer("archived_credit"):
        _refuse(state, f"receipts hold {archived} tokens of credit, the account counts {state['archived_credit']}")
    if credit + archived != state.integer("tokens"):
        _refuse(
            state, f"members and receipts have credit for {credit + archived} tokens, the run counts {state['tokens']}"
        )
    seen = set[int]()
    for line in members:
        if line.integer("member") in seen:
            _refuse(line, f"member {line['member']} is there twice")
        seen.add(line.integer("member"))
    complete = header["complete"] is True
    _check_state(replay, header, complete, state)
    if complete:
        _check_credit(replay, members, receipts, state)


def _check_state(replay: Replay, header: Line, complete: bool, state: Line) -> None:
    """State and checkpoint, as far as the record's events tell them."""
    phase, checkpoint = replay.phase, replay.checkpoint
    terms = header["terms"]
    terms_root = terms.get("model_root") if isinstance(terms, dict) else None
    if replay.model_root not in (None, terms_root):
        _refuse(header, f"the terms have model root {terms_root}, the last change of the model {replay.model_root}")
    if complete:
        phase = phase or (Phase.WAITING_FOR_MEMBERS.name, 0, 0)
        checkpoint = checkpoint or (0, str(terms_root))
    found = (state["state"], state.integer("round"), state.integer("epoch"))
    if phase is not None and found != phase:
        _refuse(state, f"state, round and epoch are {found}, after the last transition {phase}")
    reached = (state.integer("checkpoint_round"), state["checkpoint_root"])
    if checkpoint is not None and reached != checkpoint:
        _refuse(state, f"the checkpoint is {reached[1]} before round {reached[0]}, the events make {checkpoint}")
    if complete and not replay.stands_at(state.integer("cursor"), state.integer("requeued")):
        _refuse(
            state,
            f"the data stands at {state['cursor']} with {state['requeued']} returned, not by its rounds",
        )


def _check_credit(replay: Replay, members: list[Line], receipts: list[Line], state: Line) -> None:
    """What everybody has, which the events tell from the run's beginning on."""
    for line in members:
        slot = line.integer("member")
        for what, found, told in (
            ("wallet", line["wallet"], replay.wallets.get(slot)),
            ("node key", line["node_key"], replay.node_keys.get(slot)),
            ("credit", line.integer("credit"), replay.credit[slot]),
            ("updates_included", line.integer("updates_included"), replay.updates[slot]),
        ):
            if found != told:
                _refuse(line, f"{what} of member {slot} is {found}, the events make {told}")
    if missing := replay.wallets.keys() - {line.integer("member") for line in members}:
        _refuse(state, f"member {min(missing)} has joined and is not there")
    made = replay.receipts
    for line in receipts:
        one = Archived(str(line["wallet"]), line.integer("credit"), line.integer("updates_included"))
        if not made[one]:
            _refuse(line, f"no such credit of {one.wallet} was archived: {one.credit} tokens of {one.updates} updates")
        made[one] -= 1
    if left := +made:
        _refuse(state, f"a receipt is missing: {min(left)}")
    for what, found, told in (
        ("tokens", state.integer("tokens"), replay.tokens),
        ("archived_credit", state.integer("archived_credit"), replay.archived_credit),
        ("final rounds", state.integer("final_rounds"), replay.rounds),
    ):
        if found != told:
            _refuse(state, f"{what}: the account has {found}, the events make {told}")


def compare_events(record: Record, history: Sequence[Happening], gap: HistoryIncomplete | None, genesis: str) -> int:
    """Compare with the events that the chain has under the run's address; how many have happened since.

    Args:
        history, gap: what `happenings` gives.

    Raises:
        InvalidRecord: the chain says otherwise.
        HistoryIncomplete: the endpoint does not reach back to where the record begins.
    """
    header = record.lines[0]
    if header["genesis_hash"] != genesis:
        _refuse(header, f"it is of the chain with genesis hash {header['genesis_hash']}, this one has {genesis}")
    told = [line for line in record.lines if line["kind"] == "event"]
    if not told:
        return len(history)
    # An earlier run of this name, since closed, has the same address: begin where the record does.
    begins = [index for index, one in enumerate(history) if one.signature == told[0]["signature"]]
    if not begins:
        _refuse_unless_forgotten(told[0], history, gap)
    known = [event_line(one) for one in history[begins[0] :]]
    for line, there in zip(told, known, strict=False):
        if line.value != there:
            _refuse(line, f"the chain has {there['name']} of transaction {there['signature']} here, with other values")
    if len(told) > len(known):
        _refuse(told[len(known)], "the chain does not have this event")
    return len(known) - len(told)


def _refuse_unless_forgotten(first: Line, history: Sequence[Happening], gap: HistoryIncomplete | None) -> NoReturn:
    """The record's first event is not in the history. Raises HistoryIncomplete if it might have been, else
    InvalidRecord."""
    slot = first.integer("slot")
    if gap is None and history and history[0].slot <= slot:
        _refuse(first, "the chain does not have this event")
    since = f"only what happened from slot {history[0].slot} on" if history else "nothing of it"
    raise HistoryIncomplete(
        f"the record begins in slot {slot}, of its run the endpoint has {since}{f': {gap}' if gap else ''}; whether "
        "the chain says the same can only be told by an endpoint that reaches back so far"
    )


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
