"""Records of runs that were never on a chain: receipts, and data that changes on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.addresses import run_addresses
from coordinator.admin.checking import check_consistency
from coordinator.admin.record import FORMAT, InvalidRecord, Line, read_record, write_record
from coordinator.admin.replay import Replay
from coordinator.state import Phase

PROGRAM, OWNER = (str(Keypair().pubkey()) for _ in range(2))
ROOT, KEY = "01" * 32, "05" * 32
A, B = (str(Keypair().pubkey()) for _ in range(2))
Lines = list[dict[str, Any]]


def header(root: str = ROOT) -> dict[str, Any]:
    places = run_addresses(Pubkey.from_string(PROGRAM), Pubkey.from_string(OWNER), "made-up")
    return {
        "kind": "run",
        "format": FORMAT,
        "run_id": "made-up",
        "address": str(places.run),
        "program": PROGRAM,
        "owner": OWNER,
        "genesis_hash": OWNER,
        "complete": True,
        "terms": {"sequence_length": 16, "model_root": root},
    }


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "slot": 1, "signature": "s", "index": 0, "name": name, **fields}


def trained(number: int, member: int, ranges: list[list[int]], tokens: int) -> Lines:
    """A round in which one member trains everything."""
    positions = sum(count for _, count in ranges)
    started: dict[str, Any] = {"positions": positions, "active": [member], "slices": {str(member): positions}}
    return [
        event("RoundStarted", round=number, first_slot=0, ranges=ranges, **started),
        event("Committed", round=number, member=member, digest="aa", tokens=tokens),
        event("RoundFinal", round=number, is_void=0, tokens=tokens, members=[member]),
    ]


def joined(member: int, wallet: str) -> dict[str, Any]:
    return event("MemberJoined", member=member, wallet=wallet, node_key=KEY)


def phase(what: Phase, number: int) -> dict[str, Any]:
    return event("PhaseChanged", phase=int(what), round=number, epoch=0)


def moved(name: str, receipt: str, member: int, wallet: str, credit: int) -> dict[str, Any]:
    return event(name, receipt=receipt, member=member, wallet=wallet, credit=credit)


def member_line(member: int, wallet: str, credit: int, updates: int) -> dict[str, Any]:
    line = {"kind": "member", "member": member, "wallet": wallet, "node_key": KEY}
    return line | {"credit": credit, "updates_included": updates}


def receipt_line(wallet: str, credit: int, updates: int) -> dict[str, Any]:
    return {"kind": "receipt", "wallet": wallet, "credit": credit, "updates_included": updates}


def model(number: int, manifest: str, root: str = ROOT) -> dict[str, Any]:
    return event("ModelChanged", round=number, config_version=1, model_root=root, data_manifest=manifest)


def check(path: Path, events: Lines, accounts: Lines, head: dict[str, Any] | None = None, **state: Any) -> None:
    """Write it with the rounds that follow, and check it. Raises InvalidRecord."""
    lines = [head or header(), event("RunCreated", owner=OWNER, run_id="made-up")]
    replay = Replay(complete=True, most_tokens=None)
    replay.see(Line(0, lines[1]))
    for one in events:
        lines.append(one)
        made_final = replay.see(Line(len(lines), one))
        lines += [] if made_final is None else [made_final]
    last = {"kind": "state", "state": "WAITING_FOR_MEMBERS", "round": 0, "epoch": 0, "requeued": 0}
    last |= {"checkpoint_round": 0, "checkpoint_root": ROOT, "final_rounds": replay.rounds, "tokens": replay.tokens}
    last |= {"archived_credit": replay.archived_credit}
    path.unlink(missing_ok=True)
    write_record(path, [*lines, *accounts, last | state], Keypair())
    check_consistency(read_record(path))


def test_receipts_are_those_that_were_archived(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    events = [joined(0, A), joined(1, B)]
    events += [*trained(0, 0, [[0, 2]], 5), *trained(1, 1, [[2, 2]], 7), *trained(2, 1, [[4, 2]], 5)]
    events += [moved("MemberArchived", "r0", 0, A, 5), moved("MemberArchived", "r1", 1, B, 12)]
    true = [receipt_line(A, 5, 1), receipt_line(B, 12, 2)]
    check(path, events, true, cursor=6)
    check(path, events, true[::-1], cursor=6)
    for forged in (
        [receipt_line(B, 5, 1), receipt_line(B, 12, 2)],
        [receipt_line(A, 6, 1), receipt_line(B, 11, 2)],
        [receipt_line(A, 5, 2), receipt_line(B, 12, 1)],
        [receipt_line(A, 17, 3)],
        [*true, receipt_line(A, 0, 0)],
    ):
        with pytest.raises(InvalidRecord, match=r"archived|missing"):
            check(path, events, forged, cursor=6)

    back = [*events, joined(3, A), moved("MemberRestored", "r0", 3, A, 5)]
    check(path, back, [member_line(3, A, 5, 1), true[1]], cursor=6)
    for last in (moved("MemberRestored", "r0", 3, A, 4), moved("MemberRestored", "r1", 3, A, 5)):
        with pytest.raises(InvalidRecord, match="never archived"):
            check(path, [*back[:-1], last], [member_line(3, A, 5, 1), true[1]], cursor=6)
    with pytest.raises(InvalidRecord, match="made twice"):
        check(path, [*events, joined(0, A), moved("MemberArchived", "r0", 0, A, 0)], true, cursor=6)


def test_every_member_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    events = [joined(0, A), joined(1, B), joined(2, OWNER), *trained(0, 0, [[0, 2]], 5), *trained(1, 1, [[2, 2]], 5)]
    one, other, idle = member_line(0, A, 5, 1), member_line(1, B, 5, 1), member_line(2, OWNER, 0, 0)
    check(path, events, [one, other, idle], cursor=4)
    with pytest.raises(InvalidRecord, match="there twice"):
        check(path, events, [one, one, idle], cursor=4)
    with pytest.raises(InvalidRecord, match="there twice"):
        check(path, events, [one, one, idle], header() | {"complete": False}, cursor=4)
    with pytest.raises(InvalidRecord, match="member 2 has joined"):
        check(path, events, [one, other], cursor=4)


def test_who_takes_a_slot_over_has_no_updates_yet(tmp_path: Path) -> None:
    events = [joined(0, A), *trained(0, 0, [[0, 2]], 0), joined(0, B)]
    check(tmp_path / "run.jsonl", events, [member_line(0, B, 0, 0)], cursor=2)
    with pytest.raises(InvalidRecord, match="updates_included"):
        check(tmp_path / "run.jsonl", events, [member_line(0, B, 0, 1)], cursor=2)


def test_a_checkpoint_counts_from_the_end_of_its_cooldown(tmp_path: Path) -> None:
    path, other = tmp_path / "run.jsonl", "0a" * 32
    agreed = [phase(Phase.COOLDOWN, 3), event("CheckpointAgreed", round=3, votes=2, root=other)]
    check(path, agreed, [], cursor=0, state="COOLDOWN", round=3)
    ended = [*agreed, phase(Phase.PAUSED, 3)]
    check(path, ended, [], cursor=0, state="PAUSED", round=3, checkpoint_round=3, checkpoint_root=other)
    with pytest.raises(InvalidRecord, match="checkpoint"):
        check(path, ended, [], cursor=0, state="PAUSED", round=3)
    new = [*ended, model(3, "m", "0b" * 32)]
    where: dict[str, Any] = {"state": "PAUSED", "round": 3, "checkpoint_round": 3, "checkpoint_root": "0b" * 32}
    check(path, new, [], header("0b" * 32), cursor=0, **where)
    with pytest.raises(InvalidRecord, match="model root"):
        check(path, new, [], header(ROOT), cursor=0, **where)
    with pytest.raises(InvalidRecord, match="checkpoint"):
        check(path, new, [], header("0b" * 32), cursor=0, **where | {"checkpoint_root": other})
    with pytest.raises(InvalidRecord, match="no state 99"):
        check(path, [event("PhaseChanged", phase=99, round=0, epoch=0)], [], cursor=0)


def test_positions_begin_again_with_other_data_and_only_then(tmp_path: Path) -> None:
    """Data that has not changed goes on, even where positions from 0 on have just come back."""
    path = tmp_path / "run.jsonl"
    silent = [event("RoundStarted", round=0, first_slot=0, ranges=[[0, 4]], positions=4, active=[0], slices={"0": 4})]
    silent += [event("RoundFinal", round=0, is_void=1, tokens=0, members=[])]
    begun = [joined(0, A), *silent]
    member = [member_line(0, A, 2, 1)]
    # The first manifest is not known: both are possible, until positions say which.
    first = [*begun, model(1, "m"), *trained(1, 0, [[0, 4]], 2)]
    again, gone = [*first, *trained(2, 0, [[4, 4]], 0)], [*first, model(2, "n"), *trained(2, 0, [[0, 4]], 0)]
    checkpoint: dict[str, Any] = {"checkpoint_root": ROOT}
    check(path, first, member, cursor=4, checkpoint_round=1, **checkpoint)
    check(path, again, [member_line(0, A, 2, 2)], cursor=8, checkpoint_round=1, **checkpoint)
    check(path, gone, [member_line(0, A, 2, 2)], cursor=4, checkpoint_round=2, **checkpoint)
    # Other data: nothing goes on where the former stood.
    with pytest.raises(InvalidRecord, match="were not"):
        check(path, [*first, model(2, "n"), *trained(2, 0, [[4, 4]], 0)], member, cursor=8)
    # No change of the model: nothing begins again.
    with pytest.raises(InvalidRecord, match="drawn again"):
        check(path, [*first, *trained(2, 0, [[0, 4]], 0)], member, cursor=4)
    with pytest.raises(InvalidRecord, match="data stands at"):
        check(path, gone, [member_line(0, A, 2, 2)], cursor=8, checkpoint_round=2, **checkpoint)
