from __future__ import annotations

import asyncio

import pytest
from node_stage import run_async

from psyche_node.node.changes import Changes, first


def test_change_between_looking_and_waiting_is_not_missed() -> None:
    async def test() -> None:
        changes = Changes()
        version = changes.version
        changes.fire()
        await changes.beyond(version)

    run_async(test())


def test_every_waiter_wakes_and_an_old_change_wakes_nobody() -> None:
    async def test() -> None:
        changes = Changes()
        changes.fire()
        waiting = [asyncio.create_task(changes.beyond(changes.version)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        changes.fire()
        changes.fire()
        await asyncio.gather(*waiting)

    run_async(test())


def test_first_ends_with_the_first_and_cancels_the_others() -> None:
    async def test() -> None:
        ended: list[str] = []

        async def wait(name: str, event: asyncio.Event) -> None:
            try:
                await event.wait()
            finally:
                ended.append(name)

        now, never = asyncio.Event(), asyncio.Event()
        now.set()
        await first(wait("now", now), wait("never", never))
        assert sorted(ended) == ["never", "now"]
        assert len(asyncio.all_tasks()) <= 2

    run_async(test())


def test_first_passes_on_the_error_of_the_one_that_ended() -> None:
    async def test() -> None:
        async def fail() -> None:
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await first(fail(), asyncio.Event().wait())

    run_async(test())


def test_first_that_is_cancelled_leaves_no_task() -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        task = asyncio.create_task(first(asyncio.Event().wait(), asyncio.Event().wait()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before

    run_async(test())
