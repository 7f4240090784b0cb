from __future__ import annotations

import asyncio
import logging

import pytest
from node_stage import run_async, settle

from psyche_node.node import meeting
from psyche_node.node.changes import Changes
from psyche_node.node.meeting import MOST_NEEDED, Meeting, needed

LONG = 1000.0


class Stage:
    def __init__(self, others: int) -> None:
        self.others, self.here, self.changes = set(range(1, others + 1)), set[int](), Changes()
        self.meeting = Meeting(lambda: self.others, lambda: self.here, self.changes)

    def meet(self, *slots: int) -> None:
        self.here |= set(slots)
        self.changes.fire()

    async def waits(self, held: asyncio.Task[None]) -> None:
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not held.done()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_SECONDS", 0.002)


def test_two_thirds_are_needed_and_a_few_of_many() -> None:
    assert [needed(others) for others in range(6)] == [0, 1, 1, 2, 3, 3]
    assert needed(255) == MOST_NEEDED


def test_a_member_is_not_ready_before_it_is_connected_to_enough(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "SAY_SECONDS", 0.005)

    async def test() -> None:
        stage = Stage(3)
        held = asyncio.create_task(stage.meeting.held(LONG, alone=True))
        await stage.waits(held)
        stage.meet(2)
        await stage.waits(held)
        assert "connected to 1 of 3 other members, 2 needed; missing: [1, 3]" in caplog.text
        stage.meet(3)
        await held
        assert "not connected to members [1] yet" in caplog.text

    with caplog.at_level(logging.WARNING):
        run_async(test())


def test_all_are_waited_for_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_SECONDS", LONG)

    async def test() -> None:
        stage = Stage(3)
        held = asyncio.create_task(stage.meeting.held(LONG, alone=False))
        stage.meet(1, 2)
        await stage.waits(held)
        stage.meet(3)
        await held

    run_async(test())


def test_at_the_deadline_one_is_enough_and_none_only_if_a_run_may_have_one_member() -> None:
    async def test() -> None:
        stage = Stage(3)
        held = asyncio.create_task(stage.meeting.held(0.004, alone=False))
        await stage.waits(held)
        stage.meet(3)
        await held
        await Stage(3).meeting.held(0.004, alone=True)
        await Stage(0).meeting.held(LONG, alone=False)

    run_async(test())


def test_a_member_that_has_gone_is_not_waited_for() -> None:
    async def test() -> None:
        stage = Stage(1)
        held = asyncio.create_task(stage.meeting.held(LONG, alone=False))
        await stage.waits(held)
        stage.others.clear()
        stage.changes.fire()
        await held

    run_async(test())


def test_the_time_that_is_left_is_not_spent_on_those_who_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing happens meanwhile: it is the clock that ends the waiting."""
    monkeypatch.setattr(meeting, "SAY_SECONDS", LONG)

    async def test() -> None:
        stage = Stage(3)
        stage.meet(1, 2)
        await stage.meeting.held(LONG, alone=False)  # after MEET_SECONDS
        monkeypatch.setattr(meeting, "MEET_SECONDS", LONG)
        await stage.meeting.held(0.002, alone=False)
        monkeypatch.setattr(meeting, "MEET_SECONDS", 0.0)
        await Stage(3).meeting.held(0.1, alone=True)

    run_async(test())


def test_connections_to_others_than_the_members_do_not_count() -> None:
    async def test() -> None:
        stage = Stage(3)
        stage.meet(1, 7, 8, 9)
        held = asyncio.create_task(stage.meeting.held(LONG, alone=False))
        await stage.waits(held)
        stage.meet(2)
        await held

    run_async(test())


def test_what_is_missing_is_said_now_and_then_and_not_at_every_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "SAY_SECONDS", 0.2)

    async def test() -> None:
        stage = Stage(3)
        held = asyncio.create_task(stage.meeting.held(LONG, alone=False))
        await settle(lambda: "not ready" in caplog.text)
        for _ in range(200):
            stage.changes.fire()
            await asyncio.sleep(0)
        assert caplog.text.count("not ready") < 20
        held.cancel()

    with caplog.at_level(logging.WARNING):
        run_async(test())
