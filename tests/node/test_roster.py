"""What is read from the member table, when it is read again, and what ends the node."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from member_stage import ME, Scene, scene
from node_stage import ScriptedChain, child, run_async, settle, settle_down, watching
from node_values import member_of, pulse_of

from coordinator.client import Pulse
from coordinator.state import Member, MemberStatus, Phase
from coordinator.ticking import tick_delay
from psyche_node.exits import Exit, exit_for
from psyche_node.network.messages import Rejected, Why
from psyche_node.node import roster as module
from psyche_node.node.roster import Roster
from psyche_node.node.standing import Dropped, JoinRefused


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS_PAUSE_SECONDS", 0.0)


def unread() -> Roster:
    """A roster that has read nothing, and needs nothing for what is tested."""
    return Roster(None, None, None, member_of(ME).wallet, None)  # type: ignore[arg-type]


def mine(status: MemberStatus, slot: int) -> Member:
    return dataclasses.replace(member_of(ME, status), status_slot=slot)


async def read_at(it: Scene, pulse: Pulse) -> None:
    """Show the roster this state of the run, and let it read the table again."""
    reads = it.chain.calls["members"]
    it.chain.push(pulse)
    await settle(lambda: it.chain.calls["members"] > reads)


def test_of_two_answers_the_older_changes_nothing() -> None:
    async def test() -> None:
        roster = unread()
        dropped = asyncio.create_task(roster.dropped())
        roster.see(mine(MemberStatus.PENDING, 3))
        assert (roster.slot, roster.before) == (ME, None)
        roster.see(mine(MemberStatus.ACTIVE, 5))
        for status, slot in ((MemberStatus.DROPPED, 4), (MemberStatus.ACTIVE, 5)):
            roster.see(mine(status, slot))
            assert roster.before is MemberStatus.PENDING
        await settle_down()
        assert not dropped.done()
        last = mine(MemberStatus.DROPPED, 5)  # in the same slot
        roster.see(last)
        assert await dropped is last
        assert roster.before is MemberStatus.ACTIVE

    run_async(test())


def test_a_table_with_gaps_is_one_queue_for_the_ticks() -> None:
    """Slots stay their members': of eight, every other one has left. In every round exactly one is to tick first."""

    async def test() -> None:
        table = [member_of(slot, MemberStatus.LEFT if slot % 2 else MemberStatus.ACTIVE) for slot in range(8)]
        chain, places = ScriptedChain(), []
        chain.list = tuple(table)
        async with watching(chain) as view:
            for member in table:
                roster = Roster(chain, view, None, member.wallet, None)  # type: ignore[arg-type]
                roster.see(member)
                await roster.read()
                places.append(roster.place)
        assert places == [0, None, 1, None, 2, None, 3, None]
        for round in range(5):
            assert [tick_delay(place, round, 4) for place in places].count(0) == 1

    run_async(test())


def test_others_are_those_who_train_or_are_about_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            for slot, status in enumerate((MemberStatus.PENDING, None, MemberStatus.DROPPED, MemberStatus.DESYNCED)):
                if status is not None:
                    it.change(slot, status=status)
            assert await it.roster.read() is not None
            assert it.roster.others() == {0}
            it.set(MemberStatus.DROPPED)
            assert await it.roster.read() is None, "no live membership"

    run_async(test())


def test_the_network_gets_the_list_when_it_has_changed(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.lists == [[0, 1, 2, 3]])
            reads = it.chain.calls["members"]
            it.roster.look()
            await settle(lambda: it.chain.calls["members"] > reads)
            it.change(3, status=MemberStatus.LEFT)
            it.roster.look()
            await settle(lambda: it.lists == [[0, 1, 2, 3], [0, 1, 2]])
            assert it.roster.others() == {0, 2}

    run_async(test())


REFUSED = Rejected(peer="", member=None, what="call", why=Why.NOT_A_MEMBER, reason="")
TRAINS = pulse_of(Phase.ROUND_TRAIN, 1)


def sees(pulse: Pulse) -> Callable[[Scene], None]:
    return lambda it: it.chain.push(pulse)


@pytest.mark.parametrize(
    ("begins", "happens", "reads"),
    [
        (TRAINS, lambda it: it.roster.look(), 1),
        (TRAINS, lambda it: it.roster.on_event(REFUSED), 1),
        (TRAINS, lambda it: it.roster.on_event(REFUSED.model_copy(update={"why": Why.EXPIRED})), 0),
        (TRAINS, sees(dataclasses.replace(TRAINS, header=dataclasses.replace(TRAINS.header, members=5))), 1),
        (TRAINS, sees(dataclasses.replace(TRAINS, header=dataclasses.replace(TRAINS.header, active=3))), 1),
        (TRAINS, sees(pulse_of(Phase.ROUND_WITNESS, 1)), 0),
        (pulse_of(Phase.WAITING_FOR_MEMBERS), sees(pulse_of(Phase.WARMUP)), 1),
        (TRAINS, sees(pulse_of(Phase.WARMUP)), 1),
        (TRAINS, sees(pulse_of(Phase.WAITING_FOR_MEMBERS)), 1),
    ],
    ids=[
        "a round without this member",
        "a stranger",
        "another refusal",
        "one more member",
        "one active less",
        "another phase of the round",
        "the warm-up",
        "another warm-up",
        "the end of an epoch",
    ],
)
def test_the_table_is_read_again_when_it_may_have_changed(
    tmp_path: Path, begins: Pulse, happens: Callable[[Scene], None], reads: int
) -> None:
    async def test() -> None:
        async with scene(tmp_path, begins=begins) as it:
            it.keeping.cancel()  # which reads the table for itself
            await settle(lambda: bool(it.lists))
            await settle_down()
            before = it.chain.calls["members"]
            happens(it)
            await settle(lambda: it.chain.calls["members"] >= before + reads)
            await settle_down()
            assert it.chain.calls["members"] == before + reads, "once for each reason"

    run_async(test())


def test_strangers_cannot_have_the_table_read_without_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS_PAUSE_SECONDS", 1000.0)

    async def test() -> None:
        async with scene(tmp_path, begins=TRAINS) as it:
            await settle(lambda: it.sent() == ["ready"] and bool(it.lists))
            before = it.chain.calls["members"]
            it.roster.on_event(REFUSED)
            await settle_down()
            assert it.chain.calls["members"] == before

    run_async(test())


def test_the_table_is_read_from_time_to_time_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMBERS_SECONDS", 0.001)

    async def test() -> None:
        async with scene(tmp_path) as it:
            await settle(lambda: it.chain.calls["members"] > 10)

    run_async(test())


def test_another_node_with_this_wallet_ends_this_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.change(ME, node_key=bytes([9]) * 32)
            it.roster.look()
            with pytest.raises(JoinRefused, match="goes on under another node key") as said:
                await it.following
            assert exit_for(said.value) is Exit.JOIN_REFUSED

    run_async(test())


def test_a_member_whose_slot_is_another_wallets_ends(tmp_path: Path) -> None:
    """Also when this wallet has joined again elsewhere: this node trains under the old number."""

    async def test() -> None:
        async with scene(tmp_path) as it:
            it.change(ME, wallet=member_of(9).wallet)
            it.change(2, wallet=member_of(ME).wallet, node_key=it.key.public)
            it.roster.look()
            with pytest.raises(Dropped, match="member 1 is another wallet by now") as said:
                await it.following
            assert exit_for(said.value) is Exit.DROPPED

    run_async(test())


def test_who_is_no_member_has_the_list_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        chain = ScriptedChain()
        it = Scene(tmp_path, chain)
        async with watching(chain) as view, child(it.network) as (network, _):
            chain.push(TRAINS)
            await view.until(lambda pulse: True)
            outsider = Roster(chain, view, network, member_of(9).wallet, it.key)  # type: ignore[arg-type]
            following = asyncio.create_task(outsider.follow())
            await settle(lambda: it.lists == [[0, 1, 2, 3]] or following.done())
            await settle_down()
            assert not following.done()
            assert outsider.slot is None
            following.cancel()

    run_async(test())


def test_a_run_that_stops_for_want_of_members_is_told_once_and_so_is_that_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def waits(members: int, number: int = 3) -> Pulse:
        pulse = pulse_of(Phase.WAITING_FOR_MEMBERS, number)
        limits = dataclasses.replace(pulse.run.limits, init_min_members=4)
        header = dataclasses.replace(pulse.header, members=members)
        return dataclasses.replace(pulse, run=dataclasses.replace(pulse.run, limits=limits), header=header)

    def told() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == module.__name__]

    async def test() -> None:
        # Before the first round a run waits as a matter of course, and so does one that has all it needs.
        async with scene(tmp_path, begins=waits(1, number=0)) as it:
            for pulse in (waits(2, number=0), waits(4), TRAINS):
                await read_at(it, pulse)
            await settle_down()
            assert told() == []
            for pulse in (waits(2), waits(3)):
                await read_at(it, pulse)
            await settle_down()
            (warning,) = told()
            assert "round 3: the run has stopped" in warning
            assert "it has 2, and needs 4" in warning
            it.chain.push(pulse_of(Phase.WARMUP, 3))
            await settle(lambda: len(told()) == 2)
            assert "the run goes on" in told()[1]
            it.chain.push(waits(2))
            await settle(lambda: len(told()) == 3)
            await read_at(it, pulse_of(Phase.FINISHED, 3))
            await settle_down()
            assert len(told()) == 3, "its owner has ended it"

    with caplog.at_level(logging.INFO):
        run_async(test())


def test_a_pause_is_told_once_and_so_is_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def told() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name == module.__name__]

    async def test() -> None:
        async with scene(tmp_path) as it:
            paused = pulse_of(Phase.PAUSED, 3)
            fewer = dataclasses.replace(paused, header=dataclasses.replace(paused.header, members=1))
            for pulse in (paused, fewer):
                await read_at(it, pulse)
            await settle_down()
            (line,) = told()
            assert "round 3: the owner has paused the run" in line
            it.chain.push(pulse_of(Phase.ROUND_TRAIN, 3))
            await settle(lambda: len(told()) == 2)
            assert "round 3: the owner has resumed the run" in told()[1]

    with caplog.at_level(logging.INFO):
        run_async(test())
