"""What the node's tests stand on: a chain that says what it is told to, and real child endpoints in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from coordinator.client import Pulse
from coordinator.state import Member, Round
from psyche_node.ipc import BlockingChannel, Endpoint, Message, serve
from psyche_node.node.view import ChainView

TIMEOUT = 90.0


def run_async(test: Coroutine[Any, Any, None]) -> None:
    """Run an async test; one that waits for ever fails."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT):
            await test

    asyncio.run(bounded())


class ScriptedChain:
    """Stands in for the client of the chain: states are pushed, what is sent is written down.

    ``errors`` maps a method to the exceptions that its next calls raise.
    """

    slot_seconds = 0.05

    def __init__(self) -> None:
        self.table: tuple[Round, ...] = ()
        self.list: tuple[Member, ...] = ()
        self.sent: list[tuple[Any, ...]] = []
        self.errors: dict[str, list[Exception]] = {}
        self.calls: Counter[str] = Counter()
        self.on_sent: Callable[[tuple[Any, ...]], None] = lambda what: None
        self._pulses: asyncio.Queue[Pulse] = asyncio.Queue()

    def push(self, pulse: Pulse) -> None:
        self._pulses.put_nowait(pulse)

    async def watch(self, delay: object = None) -> AsyncIterator[Pulse]:
        while True:
            yield await self._pulses.get()

    async def rounds(self) -> tuple[Round, ...]:
        await self._pass("rounds")
        return self.table

    async def round(self, number: int, slots: int, update_bytes: int, *, commitments: bool) -> Round | None:
        found = next((record for record in await self.rounds() if record.round == number), None)
        return found if found is None or commitments else dataclasses.replace(found, commitments={})

    async def members(self) -> tuple[Member, ...]:
        await self._pass("members")
        return self.list

    async def _pass(self, name: str) -> None:
        self.calls[name] += 1
        await asyncio.sleep(0)
        if self.errors.get(name):
            raise self.errors[name].pop(0)

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, None]]:
        if name not in ("attest", "commit", "tick", "join", "ready", "checkpoint", "set_share"):
            raise AttributeError(name)

        async def send(*arguments: Any) -> None:
            try:
                await self._pass(name)
            finally:
                self.sent.append((name, *arguments))
                self.on_sent((name, *arguments))

        return send


@contextlib.asynccontextmanager
async def watching(chain: ScriptedChain) -> AsyncIterator[ChainView]:
    view = ChainView(chain)  # type: ignore[arg-type]
    task = asyncio.create_task(view.follow())
    try:
        yield view
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def child(
    handle: Callable[[Message], Message],
    on_event: Callable[[Message], None] = lambda message: None,
    patience: float | None = None,
) -> AsyncIterator[tuple[Endpoint, BlockingChannel]]:
    """A real endpoint over a real socket pair, whose other end a thread serves with ``handle``."""
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs.detach())
    thread = threading.Thread(target=serve, args=(channel, handle), daemon=True)
    endpoint = await Endpoint.over("child", ours, on_event, patience)
    thread.start()
    try:
        yield endpoint, channel
    finally:
        await endpoint.close()
        await asyncio.to_thread(thread.join, TIMEOUT)
        channel.close()
        assert not thread.is_alive()


async def settle_down() -> None:
    """Let the others go on for long enough for a wrong extra step to begin; a right one never depends on it."""
    for _ in range(20):
        await asyncio.sleep(0.001)


async def settle(condition: Callable[[], bool]) -> None:
    """Let the other tasks and threads go on until ``condition`` holds; ``run_async`` bounds it."""
    while not condition():
        await asyncio.sleep(0.001)
