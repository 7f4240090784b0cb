"""Exported runs: what is written, that it can be checked, and that no change to it goes unnoticed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from admin_harness import CONFIG, admin, admin_json
from ledger_process import Ledger
from runs import close, joined, take_part
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.admin.checking import check_consistency
from coordinator.admin.pool import Pool, cut
from coordinator.admin.record import InvalidRecord, Line, read_record, write_record
from coordinator.admin.replay import Replay
from coordinator.client import CoordinatorClient
from coordinator.wallet import load_keypair


@pytest.fixture(scope="module")
def owner(ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("owner") / "owner.json"
    admin("keys", "new", path)
    admin("ledger", "airdrop", path, "50", "--rpc", ledger.rpc)
    return path


@pytest.fixture(scope="module")
def finished(ledger: Ledger, program: tuple[Keypair, Pubkey], owner: Path) -> str:
    """A run of four rounds from end to end, in which one of three members stays silent and is dropped."""
    path = owner.with_name("run.toml")
    path.write_text(CONFIG)
    options = ("--payer", owner, "--program", program[1], "--config", path, "--rpc", ledger.rpc)
    # Two thirds of the data are two members': both of those that are there are needed, and only the silent one is
    # waited for no longer than the grace.
    short = ("--set", "limits.batch=9", "--set", "limits.max_missed=1")
    address: str = admin_json("run", "create", *options, *short)["address"]

    async def play() -> None:
        nodes = [await joined([ledger.rpc], Pubkey.from_string(address)) for _ in range(3)]
        await asyncio.gather(*(take_part(node) for node in nodes[:2]), take_part(nodes[2], until_round=1))
        await close(*nodes)

    asyncio.run(asyncio.wait_for(play(), 300))
    return address


@pytest.fixture(scope="module")
def record(ledger: Ledger, finished: str, owner: Path) -> Path:
    path = owner.with_name("run.jsonl")
    result = admin_json("run", "export", finished, "--out", path, "--wallet", owner, "--rpc", ledger.rpc)
    assert result["complete"] is True
    assert result["lines"] == len(path.read_text().splitlines())
    return path


def test_a_record_says_who_trained_what(ledger: Ledger, finished: str, record: Path, owner: Path) -> None:
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [one["round"] for one in rounds] == [0, 1, 2, 3]
    members = {line["member"]: line for line in lines if line["kind"] == "member"}

    async def read() -> None:
        async with await CoordinatorClient.open([ledger.rpc], finished) as client:
            pulse, kept = await client.pulse(), await client.rounds()
        assert {entry.round: set(entry.included) for entry in kept} == {
            one["round"]: {part["member"] for part in one["trained"] if part["included"]} for one in rounds
        }
        for entry in kept:
            for part in rounds[entry.round]["trained"]:
                positions = [p for start, count in part["positions"] for p in range(start, start + count)]
                assert positions == entry.positions(part["member"])
        assert sum(one["tokens"] for one in rounds) == pulse.run.tokens
        assert lines[-2]["checkpoint_root"] == pulse.run.checkpoint_root.hex()

    asyncio.run(read())
    assert members[2]["status"] == "DROPPED"
    for slot, member in members.items():
        own = [part for one in rounds for part in one["trained"] if part["member"] == slot and part["included"]]
        assert member["credit"] == sum(part["tokens"] for part in own)
        assert {part["wallet"] for part in own} <= {member["wallet"]}
    counted = [
        p
        for one in rounds
        for part in one["trained"]
        if part["included"]
        for s, n in part["positions"]
        for p in range(s, s + n)
    ]
    assert len(counted) == len(set(counted)), "no position is trained twice"
    assert any(one["returned"] for one in rounds), "the silent member's positions come back"

    text = admin("run", "verify", record, "--rpc", ledger.rpc, "--signer", load_keypair(owner).pubkey())
    assert "the chain says the same; 0 events have happened since" in text
    checked = admin_json("run", "verify", record)
    assert (checked["rounds"], checked["valid"], checked["events_since"]) == (4, True, None)
    assert "not by" in admin("run", "verify", record, "--signer", Keypair().pubkey(), status=82)
    again = ("run", "export", finished, "--out", record, "--wallet", owner, "--rpc", ledger.rpc)
    assert "never replaces" in admin(*again, status=13)


def test_every_byte_is_signed(record: Path, tmp_path: Path) -> None:
    original = record.read_bytes()
    changed = tmp_path / "changed.jsonl"
    lines = original.splitlines(keepends=True)
    for at in range(0, len(original), max(len(original) // 150, 1)):
        if original[at : at + 1] == b"\n":
            continue
        changed.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        with pytest.raises(InvalidRecord):
            read_record(changed)
    for kept in (lines[:-1], lines[1:], [*lines[:3], *lines[4:]], [*lines, lines[-1]], [*lines[:-1], b"{}\n"], []):
        changed.write_bytes(b"".join(kept))
        with pytest.raises(InvalidRecord):
            read_record(changed)
    changed.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(InvalidRecord, match="line 1"):
        read_record(changed)


Change = Callable[[list[dict[str, Any]]], None]


def event(lines: list[dict[str, Any]], name: str, number: int = 0) -> dict[str, Any]:
    return [line for line in lines if line.get("name") == name][number]


def more_credit(lines: list[dict[str, Any]]) -> None:
    next(line for line in lines if line["kind"] == "member")["credit"] += 1


def moved_credit(lines: list[dict[str, Any]]) -> None:
    members = [line for line in lines if line["kind"] == "member"]
    members[0]["credit"] -= 1
    members[1]["credit"] += 1


def included_silent(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundFinal", 1)["members"] = [0, 1, 2]


def more_tokens(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundFinal", -1)["tokens"] += 1


def positions_twice(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted", 3)["ranges"] = event(lines, "RoundStarted", 0)["ranges"]


def skipped_positions(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted", 0)["ranges"][0][0] = 1


def bad_sum(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted")["slices"]["0"] += 1


def committed_twice(lines: list[dict[str, Any]]) -> None:
    one = event(lines, "Committed")
    lines.insert(lines.index(one), dict(one))


def too_many_tokens(lines: list[dict[str, Any]]) -> None:
    event(lines, "Committed")["tokens"] = 10**6


def attested_silent(lines: list[dict[str, Any]]) -> None:
    event(lines, "Attested", -1)["members"] = [0, 1, 2]


def other_round(lines: list[dict[str, Any]]) -> None:
    next(line for line in lines if line["kind"] == "round")["trained"][0]["included"] = False


def no_round(lines: list[dict[str, Any]]) -> None:
    lines.remove(next(line for line in lines if line["kind"] == "round"))


def other_root(lines: list[dict[str, Any]]) -> None:
    lines[-1]["checkpoint_root"] = "11" * 32


def other_wallet(lines: list[dict[str, Any]]) -> None:
    event(lines, "MemberJoined")["wallet"] = str(Keypair().pubkey())


def no_beginning(lines: list[dict[str, Any]]) -> None:
    lines.remove(event(lines, "RunCreated"))


def back_in_time(lines: list[dict[str, Any]]) -> None:
    event(lines, "RunCreated")["slot"] = 10**9


def not_a_number(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted")["positions"] = "eight"


def not_ranges(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted")["ranges"] = [[0]]


def not_slices(lines: list[dict[str, Any]]) -> None:
    event(lines, "RoundStarted")["slices"] = {"x": 1}


def members_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == "member"]


def other_updates(lines: list[dict[str, Any]]) -> None:
    members_of(lines)[0]["updates_included"] += 1


def other_node_key(lines: list[dict[str, Any]]) -> None:
    members_of(lines)[0]["node_key"] = "22" * 32


def other_checkpoint_round(lines: list[dict[str, Any]]) -> None:
    lines[-1] |= {"checkpoint_round": 7, "checkpoint_root": "ff" * 32}


def start_as_checkpoint(lines: list[dict[str, Any]]) -> None:
    lines[-1] |= {"checkpoint_round": 0, "checkpoint_root": lines[0]["terms"]["model_root"]}


def other_cursor(lines: list[dict[str, Any]]) -> None:
    lines[-1]["cursor"] += 1


def other_requeued(lines: list[dict[str, Any]]) -> None:
    lines[-1]["requeued"] += 1


def other_final_round(lines: list[dict[str, Any]]) -> None:
    lines[-1]["round"] += 1


def other_epoch(lines: list[dict[str, Any]]) -> None:
    lines[-1]["epoch"] += 1


def other_phase(lines: list[dict[str, Any]]) -> None:
    lines[-1]["state"] = "PAUSED"


def no_terms(lines: list[dict[str, Any]]) -> None:
    lines[0]["terms"] = []


def no_state(lines: list[dict[str, Any]]) -> None:
    lines.pop()


CHANGES: tuple[Change, ...] = (
    more_credit,
    moved_credit,
    included_silent,
    more_tokens,
    positions_twice,
    skipped_positions,
    bad_sum,
    committed_twice,
    too_many_tokens,
    attested_silent,
    other_round,
    no_round,
    other_root,
    other_wallet,
    no_beginning,
    back_in_time,
    not_a_number,
    not_ranges,
    not_slices,
    other_updates,
    other_node_key,
    other_checkpoint_round,
    start_as_checkpoint,
    other_cursor,
    other_requeued,
    other_final_round,
    other_epoch,
    other_phase,
    no_terms,
    no_state,
)


def test_what_cannot_be_is_found_whoever_signs_it(record: Path, tmp_path: Path) -> None:
    """A liar signs with a key of its own, so the chain of hashes is right; what it says is not."""
    liar = Keypair()
    original = [json.loads(line) for line in record.read_text().splitlines()][:-1]
    path = tmp_path / "same.jsonl"
    write_record(path, original, liar)
    assert check_consistency(read_record(path)).rounds == 4
    for change in CHANGES:
        lines = json.loads(json.dumps(original))
        change(lines)
        assert lines != original, change.__name__
        path = tmp_path / f"{change.__name__}.jsonl"
        write_record(path, lines, liar)
        with pytest.raises(InvalidRecord):
            check_consistency(read_record(path))


def test_a_record_that_begins_in_the_middle(record: Path, tmp_path: Path) -> None:
    """From an endpoint that has forgotten the beginning: what is there is checked, what came before is not made up."""
    original = [json.loads(line) for line in record.read_text().splitlines()][:-1]
    names = [line.get("name") for line in original]
    second = [index for index, name in enumerate(names) if name == "RoundStarted"][1]
    for first in (2, second - 3, second, second + 1):
        replay = Replay(complete=False, most_tokens=16)
        lines = [original[0] | {"complete": False}]
        for line in original[first:]:
            if line["kind"] == "round":
                continue
            lines.append(dict(line))
            made_final = replay.see(Line(0, line)) if line["kind"] == "event" else None
            lines += [] if made_final is None else [made_final]
        path = tmp_path / f"from-{first}.jsonl"
        write_record(path, lines, Keypair())
        assert check_consistency(read_record(path)).complete is False
        assert "not from the run's beginning" in admin("run", "verify", path)
        more_tokens(lines)
        write_record(tmp_path / f"wrong-{first}.jsonl", lines, Keypair())
        with pytest.raises(InvalidRecord):
            check_consistency(read_record(tmp_path / f"wrong-{first}.jsonl"))


def test_what_is_consistent_and_not_on_the_chain_is_found(ledger: Ledger, record: Path, tmp_path: Path) -> None:
    liar = Keypair()
    original = [json.loads(line) for line in record.read_text().splitlines()][:-1]
    for number, change in enumerate((("digest", "ff" * 32), ("fingerprint", "0" * 16), ("signature", "1" * 64))):
        lines = json.loads(json.dumps(original))
        one = event(lines, "Committed", 1)
        for line in lines:
            if line["kind"] == "round":
                for part in line["trained"]:
                    if part["digest"] == one["digest"] and change[0] == "digest":
                        part["digest"] = change[1]
        one[change[0]] = change[1]
        path = tmp_path / f"{number}.jsonl"
        write_record(path, lines, liar)
        check_consistency(read_record(path))
        assert "the chain has Committed" in admin("run", "verify", path, "--rpc", ledger.rpc, status=82)


def test_a_pool_gives_every_position_once() -> None:
    pool = Pool()
    assert pool.take([(0, 10)]) is None
    assert "drawn again" in str(pool.take([(3, 1)]))
    assert "were not" in str(pool.take([(11, 1)]))
    pool.give_back([(2, 3), (5, 1), (8, 1)])
    assert (pool.returned, pool.cursor) == (5, 10)
    assert "drawn again" in str(pool.take([(7, 2)]))
    assert pool.take([(3, 2), (10, 4)]) is None
    assert pool.take([(2, 1), (5, 1), (8, 1)]) is None
    assert pool.returned == 0
    assert cut([(5, 2), (20, 3)], 1, 3) == [(6, 1), (20, 2)]
