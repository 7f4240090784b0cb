from __future__ import annotations

import asyncio
import logging

import pytest
from node_stage import run_async

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
