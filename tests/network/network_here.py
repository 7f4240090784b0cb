"""Whole network nodes in the test's own process, on real sockets: for tests that look inside or make a part fail."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio
from network_driver import RUN

from psyche_node.identity import NodeKey
from psyche_node.ipc import Message
from psyche_node.network.messages import Configure, MemberEntry, SetMembers
from psyche_node.network.node import NetworkNode

PATIENCE = 90.0


class Here:
    """A network node and the events it sent."""

    def __init__(self, folder: Path, bootstrap: list[str], **settings: object) -> None:
        self.events: list[Message] = []
        folder.mkdir()
        fields = {"folder": str(folder), "node_key_path": str(folder / "node.key"), "bootstrap": bootstrap}
        self.node = NetworkNode(Configure.model_validate({**fields, "run": RUN.hex(), **settings}), self.events.append)
        self.key: NodeKey = self.node._key

    async def members(self, *nodes: Here) -> None:
        """Make these the members, in slot order."""
        entries = [MemberEntry(slot=slot, node_key=node.key.public.hex()) for slot, node in enumerate(nodes)]
        await self.node.handle(SetMembers(members=entries))

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():
                await trio.sleep(0.02)

    async def hears(self, *events: Message) -> None:
        await self.until(lambda: all(event in self.events for event in events))


@contextlib.asynccontextmanager
async def nodes(folder: Path, count: int, **settings: object) -> AsyncIterator[list[Here]]:
    """Run nodes in this process; the first is the bootstrap node of the others."""
    async with contextlib.AsyncExitStack() as stack:
        started: list[Here] = []
        bootstrap: list[str] = []
        for number in range(count):
            here = Here(folder / str(number), bootstrap, **settings)
            ready = await stack.enter_async_context(here.node.running())
            bootstrap = bootstrap or ready.multiaddrs
            started.append(here)
        yield started
