"""What a member does that was dropped: when it joins again, and when it ends."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from member_stage import ME, scene
from node_stage import run_async, settle, settle_down
from node_values import KEY, commitment, member_of, pulse_of, round_of

from coordinator.client import ProgramError
from coordinator.errors import ErrorCode
from coordinator.state import Commitment, MemberStatus, Phase, Round
from psyche_node.exits import Exit, exit_for
from psyche_node.node.membership import MOST_RETURNS
from psyche_node.node.roundloop import Desynced
from psyche_node.node.standing import Dropped, Ejected


def test_a_dropped_member_joins_again_and_says_that_it_is_ready(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.set(MemberStatus.DROPPED, 10, next_share=77)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3, checkpoint_root=bytes([9]) * 32))
            await settle(lambda: it.sent() == ["ready", "join", "ready"])
            assert it.chain.sent[1:] == [("join", it.key.keypair, 77, None), ("ready", bytes([9]) * 32)]
            assert it.journal() == ["joined", "dropped", "joined"]
            assert not it.keeping.done()
            assert not it.following.done()

    run_async(test())


def test_a_member_that_is_dropped_again_and_again_waits_longer_and_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            slot, number = 10, 0
            it.chain.on_sent = lambda what: it.set(MemberStatus.PENDING, slot) if what[0] == "join" else None
            for returns in range(MOST_RETURNS):
                slot += 1
                it.set(MemberStatus.DROPPED, slot, updates_included=3)  # what counted before
                members = 3 - returns % 2  # what makes the node look at the table
                it.chain.push(pulse_of(Phase.ROUND_TRAIN, number, members=members))
                await it.said("dropped", returns + 1)
                if pause := 2 ** (returns - 1) if returns else 0:
                    it.chain.push(pulse_of(Phase.ROUND_TRAIN, number + pause - 1, members=members))
                    await asyncio.sleep(0.01)
                    assert it.sent().count("join") == returns, "too soon"
                number += pause
                it.chain.push(pulse_of(Phase.ROUND_TRAIN, number, members=members))
                await settle(
                    lambda returns=returns: it.sent()[-1] == "ready" and it.sent().count("join") == returns + 1
                )  # type: ignore[misc]
            it.set(MemberStatus.DROPPED, slot + 1, updates_included=3)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, number, members=1))
            with pytest.raises(Dropped, match=r"dropped member 1 6 times.*not ready when") as said:
                await it.keeping
            assert exit_for(said.value) is Exit.DROPPED

    run_async(test())


def test_a_member_whose_update_counted_begins_to_count_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            slot = 10
            it.chain.on_sent = lambda what: it.set(MemberStatus.PENDING, slot) if what[0] == "join" else None
            for returns in range(MOST_RETURNS + 2):
                slot += 1
                it.set(MemberStatus.DROPPED, slot, updates_included=returns + 1)
                it.chain.push(pulse_of(Phase.ROUND_TRAIN, 0, members=3 - returns % 2))
                await it.said("ready", returns + 2)

    run_async(test())


def test_a_dropped_member_joins_only_when_it_has_caught_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche_node.node.membership._LOOK_SECONDS", 0.0)

    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.set(MemberStatus.DROPPED, 10)
            it.replica.applied = 4
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3, final_rounds=5))
            await it.said("dropped", 1)
            for _ in range(50):
                await asyncio.sleep(0)
            assert it.sent() == ["ready"], "its weights are not the others' yet"
            it.replica.applied = 5
            await settle(lambda: it.sent() == ["ready", "join", "ready"])

    run_async(test())


@pytest.mark.parametrize(("others", "desynced"), [((1, 1, 2), False), ((2, 2, 2), True), ((1, 2, 3), False)])
def test_a_dropped_member_whose_last_fingerprint_was_not_the_majoritys_ends(
    tmp_path: Path, others: tuple[int, int, int], desynced: bool
) -> None:
    prints = dict(zip((0, 2, 3), others, strict=True)) | {ME: 1}
    commitments = [dataclasses.replace(commitment(slot), fingerprint=value) for slot, value in prints.items()]

    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.chain.table = (round_of(4, commitments),)
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            if desynced:
                with pytest.raises(Desynced, match="round 4: the fingerprint of these weights"):
                    await it.keeping
                assert it.sent() == ["ready"]
            else:
                await settle(lambda: it.sent() == ["ready", "join", "ready"])

    run_async(test())


@pytest.mark.parametrize(
    ("found", "error"),
    [(ErrorCode.BANNED, Ejected), (ErrorCode.RUN_FULL, Dropped), (ErrorCode.GRANT_FULL, Dropped)],
)
def test_a_dropped_member_that_finds_no_place_ends_with_the_code_for_it(
    tmp_path: Path, found: ErrorCode, error: type[Exception]
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            it.chain.errors["join"] = [ProgramError(int(found), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            with pytest.raises(error):
                await it.keeping

    run_async(test())


def test_a_dropped_member_asks_for_no_more_than_the_run_gives_by_now(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            it.set(MemberStatus.DROPPED, 10, next_share=77)
            now = pulse_of(Phase.ROUND_TRAIN, 5, members=3)
            limits = dataclasses.replace(now.run.limits, max_share=50)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3, limits=limits))
            await settle(lambda: ("join", it.key.keypair, 50, None) in it.chain.sent)

    run_async(test())


@pytest.mark.parametrize(
    ("phase", "tries"), [(Phase.FINISHED, False), (Phase.ROUND_TRAIN, True)], ids=["seen", "found when joining"]
)
def test_a_dropped_member_of_a_finished_run_leaves_the_end_to_the_round_loop(
    tmp_path: Path, phase: Phase, tries: bool
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            it.chain.errors["join"] = [ProgramError(int(ErrorCode.RUN_FINISHED), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(phase, 5, members=3))
            await it.keeping
            assert not it.following.done()
            assert it.sent() == ["ready", *["join"] * tries]
            assert it.journal() == ["joined", *["dropped"] * tries]

    run_async(test())


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (MemberStatus.DESYNCED, Exit.DESYNCED),
        (MemberStatus.EJECTED, Exit.EJECTED),
        (MemberStatus.LEFT, Exit.LEFT),
    ],
)
def test_a_member_that_is_out_for_good_ends_with_the_code_for_it(
    tmp_path: Path, status: MemberStatus, code: Exit
) -> None:
    """In every phase: it does not stay and do nothing."""

    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])
            it.set(status, 10)
            it.chain.push(pulse_of(Phase.WAITING_FOR_MEMBERS, members=3))
            await asyncio.wait([it.following])
            error = it.following.exception()
            assert error is not None
            assert exit_for(error) is code

    run_async(test())


def test_a_member_that_is_dropped_before_it_was_ready_joins_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, peers=()) as it:
            await settle(lambda: bool(it.lists))
            it.set(MemberStatus.DROPPED, 10)
            it.chain.on_sent = lambda what: it.set(MemberStatus.PENDING, 20)
            it.chain.push(pulse_of(Phase.WAITING_FOR_MEMBERS, members=3))
            await settle(lambda: it.sent() == ["join"])

    run_async(test())


def test_a_dropped_member_asks_for_the_share_that_is_set_and_by_its_grant(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, share=500) as it:
            await it.is_ready()
            it.set(MemberStatus.DROPPED, 10, next_share=77, grant=KEY)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            await settle(lambda: ("join", it.key.keypair, 500, KEY) in it.chain.sent)

    run_async(test())


@pytest.mark.parametrize(
    ("phase", "waits"),
    [
        (Phase.ROUND_TRAIN, True),
        (Phase.ROUND_WITNESS, True),
        (Phase.COOLDOWN, True),
        (Phase.WAITING_FOR_MEMBERS, False),
        (Phase.PAUSED, False),
        (Phase.WARMUP, False),
    ],
)
def test_a_member_pauses_before_it_joins_again_only_while_others_train(
    tmp_path: Path, phase: Phase, waits: bool
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            await settle(lambda: it.sent() == ["ready", "join", "ready"])
            it.set(MemberStatus.DROPPED, 30)
            it.chain.on_sent = lambda what: it.set(MemberStatus.PENDING, 40)
            it.chain.push(pulse_of(phase, 5, members=2))
            await it.said("dropped", 2)
            await settle_down()
            assert it.sent().count("join") == (1 if waits else 2)
            it.chain.push(pulse_of(phase, 6, members=2))
            await settle(lambda: it.sent().count("join") == 2)

    run_async(test())


@pytest.mark.parametrize(
    ("found", "ends"),
    [(ErrorCode.ALREADY_A_MEMBER, False), (ErrorCode.WRONG_PHASE, True)],
)
def test_a_second_join_that_was_heard_the_first_time_is_no_error(tmp_path: Path, found: ErrorCode, ends: bool) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.chain.errors["join"] = [ProgramError(int(found), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            if ends:
                with pytest.raises(ProgramError):
                    await it.keeping
            else:
                await settle(lambda: it.sent() == ["ready", "join", "ready"])

    run_async(test())


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_member_whose_place_went_to_another_wallet_meanwhile_ends(tmp_path: Path, elsewhere: bool) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.sent() == ["ready"])

            def given_away(what: tuple[Any, ...]) -> None:
                it.change(ME, wallet=member_of(9).wallet, status=MemberStatus.ACTIVE)
                if elsewhere:
                    it.change(2, wallet=member_of(ME).wallet, node_key=it.key.public)

            it.chain.on_sent = given_away
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            with pytest.raises(Dropped, match="the place of member 1 has gone to another wallet"):
                await it.keeping

    run_async(test())


def prints(own: int, *others: int) -> list[Commitment]:
    """Commitments with these fingerprints: this member's, then those of 0, 2, 3 as far as they go."""
    slots = (ME, 0, 2, 3)
    return [
        dataclasses.replace(commitment(slot), fingerprint=n) for slot, n in zip(slots, (own, *others), strict=False)
    ]


@pytest.mark.parametrize(
    ("table", "desynced"),
    [
        ([round_of(4, prints(1, 2, 2), closed=False)], False),
        ([round_of(3, prints(1, 2, 2)), round_of(4, prints(1, 1, 1))], False),
        ([round_of(3, prints(1, 1, 1)), round_of(4, prints(1, 2, 2))], True),
        ([round_of(3, prints(1, 2, 2)), round_of(4, prints(2, 2, 2)[1:])], True),
        ([round_of(4, prints(1, 2, 2)[1:])], False),
        ([round_of(4, prints(1, 2, 2, 3))], False),
        ([round_of(4, prints(1, 1, 2, 2))], False),
    ],
    ids=["open", "mended", "new", "last of its own", "none of its own", "half", "two against two"],
)
def test_of_a_dropped_members_fingerprints_the_last_one_in_a_closed_round_decides(
    tmp_path: Path, table: list[Round], desynced: bool
) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.chain.table = tuple(table)
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 5, members=3))
            await settle(lambda: it.sent() == ["ready", "join", "ready"] or it.keeping.done())
            assert it.keeping.done() is desynced
            if desynced:
                with pytest.raises(Desynced, match="the fingerprint of these weights"):
                    await it.keeping

    run_async(test())
