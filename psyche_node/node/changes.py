"""Wake every task that waits for something to have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Changes:
    """Counts changes. A task notes ``version``, looks at the state, and waits ``beyond`` it: no change is missed."""

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def fire(self) -> None:
        self.version += 1
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def beyond(self, version: int) -> None:
        """Wait until ``version`` is no longer the newest."""
        while self.version <= version:
            await self._event.wait()


async def first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of these returns, cancel the others, and pass on an exception of the one that ended."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
