"""What a node makes of the member table: who is in the network, when it is ready, and what it does when it is out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from node_stage import ScriptedChain, child, run_async, settle, watching
from node_values import KEY, RUN, commitment, included, member_of, pulse_of, round_of

from coordinator.client import ChainUnavailable, ProgramError, RpcError
from coordinator.errors import ErrorCode
from coordinator.state import MemberStatus, Phase, Run
from psyche_node.exits import Exit, exit_for
from psyche_node.identity import load_or_create_node_key
from psyche_node.ipc import Message, Ok
from psyche_node.network.messages import MemberEntry, PeerUp, SetMembers
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.node.membership import MOST_RETURNS, Membership
from psyche_node.node.roster import Roster
from psyche_node.node.roundloop import Desynced
from psyche_node.node.standing import Dropped, Ejected, JoinRefused, RunFinished, admitted, check_in_time, why_dropped

ME = 1
ROOT = bytes(32)


class Weights:
    """The replica of a node, as its round loop has it."""

    applied = 0
    own = bytes([7]) * 32

    async def root(self) -> bytes:
        return self.own


class Scene:
    """A member of four, the chain that it sees, and the lists that its network is given."""

    def __init__(self, folder: Path, chain: ScriptedChain) -> None:
        self.folder, self.chain = folder, chain
        self.key = load_or_create_node_key(folder / "node.key")
        self.replica = Weights()
        self.lists: list[list[int]] = []
        self.roster: Roster
        self.it: Membership
        self.following: asyncio.Task[None]
        self.keeping: asyncio.Task[None]
        self.set(MemberStatus.PENDING)

    def set(self, status: MemberStatus, slot: int = 0, **fields: Any) -> None:
        """Put this member into the table like this, since ``slot``."""
        mine = dataclasses.replace(
            member_of(ME, status), node_key=self.key.public, status_slot=slot, **{"missed": 2, **fields}
        )
        self.chain.list = tuple(mine if number == ME else member_of(number) for number in range(4))

    def network(self, message: Message) -> Message:
        assert isinstance(message, SetMembers)
        self.lists.append([entry.slot for entry in message.members])
        return Ok()

    def sent(self) -> list[str]:
        return [what[0] for what in self.chain.sent]

    async def is_ready(self) -> None:
        """Wait until it has said so. From then on the run takes it back when it joins."""
        await settle(lambda: self.sent() == ["ready"])
        self.chain.on_sent = lambda what: self.set(MemberStatus.PENDING, 20) if what[0] == "join" else None

    async def said(self, name: str, count: int) -> None:
        """Wait until it has sent ``name`` so often, or noted it in the journal."""
        await settle(lambda: self.sent().count(name) == count or self.journal().count(name) == count)

    def journal(self) -> list[str]:
        return [line["kind"] for line in JournalReader(self.folder / "journal.jsonl").read()]


@contextlib.asynccontextmanager
async def scene(
    folder: Path, *errors: Exception, share: int = 0, loaded: Run = RUN, peers: Iterable[int] = (0, 2, 3)
) -> AsyncIterator[Scene]:
    """``errors``: of the first attempts to say that it is ready. ``peers``: who is connected."""
    chain = ScriptedChain()
    chain.errors["ready"] = list(errors)
    stage = Scene(folder, chain)
    journal = Journal(folder / "journal.jsonl")
    async with watching(chain) as view, child(stage.network) as (network, _):
        stage.roster = Roster(chain, view, network, member_of(ME).wallet, stage.key)  # type: ignore[arg-type]
        stage.it = Membership(chain, view, stage.roster, journal, stage.key, share, loaded)  # type: ignore[arg-type]
        for number in peers:
            stage.it.on_event(PeerUp(slot=number))
        chain.push(pulse_of(Phase.WARMUP))
        await view.until(lambda pulse: True)
        assert await stage.it.join() == ME
        tasks = [asyncio.create_task(part) for part in (stage.roster.follow(), stage.it.keep(stage.replica))]
        stage.following, stage.keeping = tasks
        try:
            yield stage
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            journal.close()


def test_a_node_key_is_that_of_the_live_member_that_has_it() -> None:
    """The program lets another wallet join with the node key of a member that was dropped."""
    key = bytes([7]) * 32
    table = [
        dataclasses.replace(member_of(0, MemberStatus.DROPPED), node_key=key),
        member_of(1),
        dataclasses.replace(member_of(2, MemberStatus.PENDING), node_key=key),
        dataclasses.replace(member_of(3, MemberStatus.DROPPED), node_key=key),
        member_of(4, MemberStatus.DROPPED),
        member_of(5, MemberStatus.EJECTED),
    ]
    expected = {1: bytes([1]) * 32, 2: key, 4: bytes([4]) * 32}
    assert admitted(table) == [
        MemberEntry(slot=slot, node_key=one.hex(), wallet=str(table[slot].wallet)) for slot, one in expected.items()
    ]


@pytest.mark.parametrize("found", [None, ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE])
def test_a_first_ready_that_is_not_confirmed_is_said_again(tmp_path: Path, found: ErrorCode | None) -> None:
    """And once it is known to have been heard, or the run to have gone on with this member, the node goes on."""
    errors = [ChainUnavailable("away"), RpcError("sendTransaction", -32000, "busy")]
    heard = [] if found is None else [ProgramError(int(found), ())]

    async def test() -> None:
        async with scene(tmp_path, *errors, *heard) as it:
            for said in (1, 2, 3):
                await it.said("ready", said)
                it.chain.push(pulse_of(Phase.WARMUP))
            await settle(lambda: not it.chain.errors["ready"])
            assert it.chain.sent == [("ready", ROOT)] * 3
            assert not it.keeping.done()

    run_async(test())


def test_a_warm_up_that_ended_before_is_waited_for_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, ProgramError(int(ErrorCode.WRONG_PHASE), ())) as it:
            await settle(lambda: it.sent() == ["ready"])
            for phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED):
                it.chain.push(pulse_of(phase))
                await asyncio.sleep(0)
            assert it.sent() == ["ready"]
            it.chain.push(pulse_of(Phase.WARMUP))
            await settle(lambda: it.sent() == ["ready", "ready"])

    run_async(test())


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
                it.set(MemberStatus.DROPPED, slot)
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
            it.set(MemberStatus.DROPPED, slot + 1)
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


@pytest.mark.parametrize(
    ("before", "fields", "words"),
    [
        (MemberStatus.PENDING, {"missed": 2}, "not ready"),
        (MemberStatus.ACTIVE, {"missed": 2}, "missed 2 rounds in a row"),
        (MemberStatus.ACTIVE, {"excluded": 2}, "2 times in a row two thirds of the witnesses did not hold its update"),
        (MemberStatus.ACTIVE, {}, "not ready"),
    ],
)
def test_why_a_member_was_dropped_is_said(before: MemberStatus, fields: dict[str, int], words: str) -> None:
    mine = dataclasses.replace(member_of(ME, MemberStatus.DROPPED), **fields)  # type: ignore[arg-type]
    limits = dataclasses.replace(pulse_of().run.limits, max_missed=2)
    assert words in why_dropped(mine, before, pulse_of(limits=limits).run)


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


def test_in_a_warm_up_a_member_that_has_trained_shows_its_own_root_and_ends_if_it_is_wrong(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.chain.errors["ready"] = [ProgramError(int(ErrorCode.WRONG_MODEL_ROOT), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.replica.applied = 5
            warm_up = pulse_of(Phase.WARMUP, 5, members=3, final_rounds=5)
            it.chain.push(warm_up)
            await settle(lambda: it.sent() == ["ready", "join", "ready"])
            assert it.chain.sent[-1] == ("ready", it.replica.own)
            it.chain.push(warm_up)
            with pytest.raises(Desynced, match="the root of these weights is 0707"):
                await it.keeping

    run_async(test())


def test_a_root_that_was_changed_meanwhile_is_shown_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.is_ready()
            it.chain.errors["ready"] = [ProgramError(int(ErrorCode.WRONG_MODEL_ROOT), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.COOLDOWN, 5, members=3))
            await settle(lambda: it.sent() == ["ready", "join", "ready"])
            it.chain.push(pulse_of(Phase.COOLDOWN, 5, members=3, checkpoint_root=bytes([9]) * 32))
            await settle(lambda: it.sent() == ["ready", "join", "ready", "ready"])
            assert it.chain.sent[-1] == ("ready", bytes([9]) * 32)

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


def test_a_dropped_member_of_a_finished_run_leaves_the_end_to_the_round_loop(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.chain.errors["join"] = [ProgramError(int(ErrorCode.RUN_FINISHED), ())]
            it.set(MemberStatus.DROPPED, 10)
            it.chain.push(pulse_of(Phase.FINISHED, 5, members=3))
            await it.keeping
            assert not it.following.done()

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


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, None),
        ({"phase": Phase.ROUND_TRAIN}, None),
        ({"phase": Phase.WARMUP, "round": 2, "sets": [included(0, ()), included(1, ())]}, None),
        ({"phase": Phase.WARMUP, "round": 2, "sets": [included(0, ()), included(1)]}, JoinRefused),
        ({"phase": Phase.ROUND_TRAIN, "round": 4, "final_rounds": 3}, JoinRefused),
        ({"phase": Phase.WAITING_FOR_MEMBERS, "round": 4, "final_rounds": 4, "checkpoint_root": KEY}, JoinRefused),
        ({"phase": Phase.FINISHED, "round": 4, "final_rounds": 4}, RunFinished),
    ],
    ids=[
        "waiting",
        "first round",
        "after void rounds",
        "after the first that counts",
        "later",
        "after a checkpoint",
        "finished",
    ],
)
def test_a_node_is_told_at_once_whether_it_comes_in_time(fields: dict[str, Any], error: type[Exception] | None) -> None:
    run = pulse_of(**{"phase": Phase.WAITING_FOR_MEMBERS, **fields}).run
    if error is None:
        check_in_time(run, Path("model"))
        return
    with pytest.raises(error, match="finished after 4 rounds" if error is RunFinished else "since round 0") as said:
        check_in_time(run, Path("model"))
    assert exit_for(said.value) is (Exit.RUN_FINISHED if error is RunFinished else Exit.JOIN_REFUSED)
