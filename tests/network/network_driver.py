"""Runs real network processes and talks to them like a supervisor does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from psyche_node.identity import NodeKey, load_or_create_node_key
from psyche_node.ipc import Endpoint, Message, Ok
from psyche_node.network.messages import Configure, MemberEntry, Ready, SetMembers
from psyche_node.network.store import BlobStore

RUN = bytes(range(32))
M = TypeVar("M", bound=Message)
PATIENCE = 60.0  # seconds; a loaded machine needs some of them


class Process:
    """One network process, its endpoint, and the events it sent."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        """``prefix`` is a command to run the process with, as ``ip netns exec NAME`` is."""
        self.folder, self.prefix = folder, prefix
        self.key: NodeKey = load_or_create_node_key(folder / "node.key")
        self.store = BlobStore(folder / "blobs")
        self.events: list[Message] = []
        self._arrived = asyncio.Event()

    async def launch(self) -> None:
        """Start the process, without a word to it."""
        ours, theirs = socket.socketpair()
        self.log = (self.folder / "network.log").open("wb")
        self.process = subprocess.Popen(
            [
                *self.prefix,
                sys.executable,
                "-m",
                "psyche_node.network",
                "--fd",
                str(theirs.fileno()),
                "--log-level",
                "DEBUG",
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=self.log,
        )
        theirs.close()
        self.endpoint = await Endpoint.over("network", ours, self._on_event)

    async def start(self, bootstrap: list[str], faults: list[str] | None = None, **settings: Any) -> Process:
        """Start the process and configure it."""
        await self.launch()
        self.ready = await self.endpoint.call(
            Configure(
                folder=str(self.folder),
                node_key_path=str(self.folder / "node.key"),
                bootstrap=bootstrap,
                run=RUN.hex(),
                faults=faults or [],
                **settings,
            ),
            Ready,
        )
        return self

    def _on_event(self, message: Message) -> None:
        self.events.append(message)
        self._arrived.set()

    async def wait(self, kind: type[M], **fields: Any) -> M:
        """Return the first event of this kind with these fields, which may have come already."""

        def matches(event: Message) -> bool:
            return isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items())

        async with asyncio.timeout(PATIENCE):
            while True:
                for event in self.events:
                    if matches(event):
                        assert isinstance(event, kind)
                        return event
                self._arrived.clear()
                await self._arrived.wait()

    def seen(self, kind: type[M]) -> list[M]:
        return [event for event in self.events if isinstance(event, kind)]

    async def ask(self, message: Message) -> None:
        await self.endpoint.call(message, Ok)

    async def members(self, *processes: Process) -> None:
        """Make ``processes`` the members, in slot order."""
        entries = [MemberEntry(slot=slot, node_key=p.key.public.hex()) for slot, p in enumerate(processes)]
        await self.ask(SetMembers(members=entries))

    def log_text(self) -> str:
        return (self.folder / "network.log").read_text()

    async def stop(self) -> int:
        """Close the endpoint, as a supervisor that dies does, and return the exit code."""
        await self.endpoint.close()
        code = await asyncio.to_thread(self.process.wait, PATIENCE)
        self.log.close()
        return code


@contextlib.asynccontextmanager
async def network(folder: Path, count: int, faults: dict[int, list[str]] | None = None) -> AsyncIterator[list[Process]]:
    """Run ``count`` processes; number 0 is the bootstrap node of the others."""
    started: list[Process] = []
    try:
        for number in range(count):
            home = folder / str(number)
            home.mkdir(parents=True)
            started.append(Process(home))
        first = await started[0].start([], (faults or {}).get(0))
        await asyncio.gather(
            *(
                process.start(first.ready.multiaddrs, (faults or {}).get(number))
                for number, process in enumerate(started)
                if number
            )
        )
        yield started
    finally:
        for process in started:
            if hasattr(process, "process") and process.process.poll() is None:
                process.process.kill()
                process.process.wait()
