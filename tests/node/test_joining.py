"""How a wallet becomes a member, and what a member does before it is ready."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from member_stage import ME, Scene, Weights, scene
from node_stage import ScriptedChain, run_async, settle, settle_down, watching
from node_values import KEY, LIMITS, RUN, TERMS, member_of, pulse_of

from coordinator.client import ChainUnavailable, ProgramError, Pulse, RpcError
from coordinator.errors import ErrorCode
from coordinator.instructions import DEFAULT_SHARE
from coordinator.state import MemberStatus, Phase
from psyche_node.network.messages import PeerDown, PeerUp
from psyche_node.node import membership as module
from psyche_node.node.journal import Journal
from psyche_node.node.meeting import Meeting
from psyche_node.node.membership import Membership
from psyche_node.node.roster import Roster
from psyche_node.node.roundloop import Desynced
from psyche_node.node.standing import JoinRefused, RunFinished

# Joining -------------------------------------------------------------------------------------------------------------


class Joining:
    """A wallet before it has joined: what ``join`` makes of the table, and what it sends."""

    def __init__(self, folder: Path) -> None:
        self.chain = ScriptedChain()
        self.scene = Scene(folder, self.chain)
        self.journal = folder / "journal.jsonl"

    async def join(self, share: int = 0, phase: Phase = Phase.WAITING_FOR_MEMBERS) -> int:
        journal = Journal(self.journal)
        async with watching(self.chain) as view:
            roster = Roster(self.chain, view, None, member_of(ME).wallet, self.scene.key)  # type: ignore[arg-type]
            self.chain.push(pulse_of(phase))
            await view.until(lambda pulse: True)
            it = Membership(self.chain, view, roster, journal, self.scene.key, share, RUN)  # type: ignore[arg-type]
            try:
                return await it.join()
            finally:
                journal.close()


@pytest.mark.parametrize(("share", "asked"), [(0, DEFAULT_SHARE), (500, 500)])
def test_a_wallet_joins_with_the_share_that_is_set(tmp_path: Path, share: int, asked: int) -> None:
    async def test() -> None:
        it = Joining(tmp_path)
        it.chain.list = ()
        it.chain.on_sent = lambda what: it.scene.set(MemberStatus.PENDING)
        assert await it.join(share) == ME
        assert it.chain.sent == [("join", it.scene.key.keypair, asked)]

    run_async(test())


def test_a_join_that_the_table_does_not_show_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        it = Joining(tmp_path)
        it.chain.list = ()
        with pytest.raises(JoinRefused, match="the member table does not list this wallet"):
            await it.join()

    run_async(test())


@pytest.mark.parametrize(("share", "asked"), [(0, 77), (500, 500)])
def test_a_member_goes_on_under_a_new_node_key(tmp_path: Path, share: int, asked: int) -> None:
    async def test() -> None:
        it = Joining(tmp_path)
        it.scene.change(ME, node_key=bytes([9]) * 32, next_share=77, grant=KEY)
        it.chain.on_sent = lambda what: it.scene.set(MemberStatus.PENDING)
        assert await it.join(share) == ME
        assert it.chain.sent == [("join", it.scene.key.keypair, asked, KEY)]
        assert it.scene.journal() == ["rotated", "joined"]

    run_async(test())


def test_a_new_node_key_that_the_chain_does_not_take_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        for after in ("another key", "no line"):
            it = Joining(tmp_path / after.replace(" ", "-"))
            it.scene.change(ME, node_key=bytes([9]) * 32)
            if after == "no line":
                it.chain.on_sent = lambda what, it=it: setattr(it.chain, "list", ())  # type: ignore[misc]
            with pytest.raises(JoinRefused, match="the chain still lists another node key for member 1"):
                await it.join()

    run_async(test())


def test_a_finished_run_takes_no_new_node_key(tmp_path: Path) -> None:
    async def test() -> None:
        it = Joining(tmp_path)
        it.scene.change(ME, node_key=bytes([9]) * 32)
        with pytest.raises(RunFinished, match="a finished run takes no other key"):
            await it.join(phase=Phase.FINISHED)
        assert it.chain.sent == []

    run_async(test())


# Being ready ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.WAITING_FOR_MEMBERS, Phase.PAUSED])
def test_a_member_is_not_ready_before_the_run_warms_up(tmp_path: Path, phase: Phase) -> None:
    async def test() -> None:
        async with scene(tmp_path, begins=pulse_of(phase)) as it:
            await settle_down()
            assert it.sent() == []
            it.chain.push(pulse_of(Phase.WARMUP))
            await settle(lambda: it.sent() == ["ready"])

    run_async(test())


def test_a_member_is_not_ready_before_it_has_met_the_others(tmp_path: Path) -> None:
    """Those of the table as it is then: others may have joined since."""

    async def test() -> None:
        async with scene(tmp_path, begins=pulse_of(Phase.WAITING_FOR_MEMBERS)) as it:
            everybody = it.chain.list
            it.chain.list = everybody[:2]
            await settle_down()
            await it.roster.read()
            for number in (2, 3):
                it.it.on_event(PeerDown(slot=number))
            it.chain.list = everybody
            it.chain.push(pulse_of(Phase.WARMUP))
            await settle_down()
            assert it.sent() == []
            it.it.on_event(PeerUp(slot=2))
            it.it.on_event(PeerUp(slot=3))
            await settle(lambda: it.sent() == ["ready"])

    run_async(test())


@pytest.mark.parametrize(
    ("run", "slot", "seconds", "alone"),
    [
        (pulse_of(Phase.WARMUP, phase_slot=10), 30, 3.0, False),  # (80 - 20) slots of 50 ms
        (pulse_of(Phase.WARMUP, phase_slot=10), 200, 0.0, False),
        (pulse_of(Phase.ROUND_TRAIN, phase_slot=10), 30, 4.0, False),
        (pulse_of(Phase.WARMUP, limits=dataclasses.replace(LIMITS, min_members=1)), 0, 4.0, True),
    ],
    ids=["warm-up", "end of the warm-up", "training", "a run of one"],
)
def test_others_are_met_in_time_for_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Pulse, slot: int, seconds: float, alone: bool
) -> None:
    """With a fifth of the warm-up left; while others train, for as long as a warm-up leaves from its beginning."""
    held: list[tuple[float, bool]] = []

    async def note(self: Meeting, seconds: float, alone: bool) -> None:
        held.append((seconds, alone))

    monkeypatch.setattr(Meeting, "held", note)

    async def test() -> None:
        async with scene(tmp_path, begins=dataclasses.replace(run, slot=slot)) as it:
            await settle(lambda: it.sent() == ["ready"])
            assert held == [(pytest.approx(seconds), alone)]

    run_async(test())


def test_a_member_is_ready_only_when_it_has_caught_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.0)

    async def test() -> None:
        async with scene(tmp_path, begins=pulse_of(Phase.ROUND_TRAIN, 2, final_rounds=2), applied=1) as it:
            await settle_down()
            assert it.sent() == []
            it.replica.applied = 2
            await settle(lambda: it.sent() == ["ready"])

    run_async(test())


def test_a_member_is_not_ready_for_other_terms_than_it_has_loaded(tmp_path: Path) -> None:
    async def test() -> None:
        other = pulse_of(Phase.WARMUP, terms=dataclasses.replace(TERMS, peak_lr_bits=7))
        async with scene(tmp_path, begins=other) as it:
            await settle_down()
            assert it.sent() == []
            assert not it.keeping.done(), "the round loop ends the node"

    run_async(test())


@pytest.mark.parametrize(
    ("applied", "phase", "shown"),
    [
        (0, Phase.WARMUP, bytes([9])),  # nothing trained yet: it is the run's own
        (1, Phase.WARMUP, Weights.own[:1]),
        (1, Phase.ROUND_TRAIN, bytes([9])),
    ],
)
def test_what_a_member_shows_when_it_is_ready(tmp_path: Path, applied: int, phase: Phase, shown: bytes) -> None:
    async def test() -> None:
        begins = pulse_of(phase, applied, final_rounds=applied, checkpoint_root=bytes([9]) * 32)
        async with scene(tmp_path, begins=begins, applied=applied) as it:
            await settle(lambda: it.chain.sent == [("ready", shown * 32)])

    run_async(test())


@pytest.mark.parametrize(
    ("applied", "now", "ends"),
    [
        (1, pulse_of(Phase.WARMUP, 1, final_rounds=1, checkpoint_root=bytes([9]) * 32), True),
        (0, pulse_of(Phase.WARMUP, 1, checkpoint_root=bytes([9]) * 32), False),  # not its own: a new checkpoint
        (1, pulse_of(Phase.ROUND_TRAIN, 1, final_rounds=1, checkpoint_root=bytes([9]) * 32), False),
        (1, pulse_of(Phase.WARMUP, 1, final_rounds=1, checkpoint_root=Weights.own), False),
    ],
    ids=["its own", "the run's", "over", "right by now"],
)
def test_a_root_that_was_refused_ends_the_node_only_if_its_weights_are_wrong(
    tmp_path: Path, applied: int, now: Pulse, ends: bool
) -> None:
    async def test() -> None:
        begins = pulse_of(Phase.WARMUP, 1, final_rounds=applied)
        refused = ProgramError(int(ErrorCode.WRONG_MODEL_ROOT), ())
        async with scene(tmp_path, refused, begins=begins, applied=applied) as it:
            await settle(lambda: it.sent() == ["ready"])
            await settle_down()
            it.chain.push(now)
            if ends:
                with pytest.raises(Desynced, match="the root of these weights is 0707"):
                    await it.keeping
            else:
                await settle(lambda: it.sent() == ["ready", "ready"] or it.keeping.done())
                assert not it.keeping.done()

    run_async(test())


def test_what_else_the_program_says_to_a_ready_member_ends_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, ProgramError(int(ErrorCode.BANNED), ())) as it:
            with pytest.raises(ProgramError):
                await it.keeping

    run_async(test())


@pytest.mark.parametrize("found", [None, ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE, ErrorCode.RUN_FINISHED])
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
            assert it.chain.sent == [("ready", bytes(32))] * 3
            assert not it.keeping.done()

    run_async(test())


def test_a_warm_up_that_ended_before_is_waited_for_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, ProgramError(int(ErrorCode.WRONG_PHASE), ())) as it:
            await settle(lambda: it.sent() == ["ready"])
            await settle_down()
            assert it.sent() == ["ready"]
            for phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED):
                it.chain.push(pulse_of(phase))
                await settle_down()
            assert it.sent() == ["ready"]
            it.chain.push(pulse_of(Phase.WARMUP))
            await settle(lambda: it.sent() == ["ready", "ready"])

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
