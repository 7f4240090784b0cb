"""A member of four as the tests of the roster and of membership see it: a scripted chain, a key, a table, a network."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from node_stage import ScriptedChain, child, settle, watching
from node_values import RUN, member_of, pulse_of

from coordinator.client import Pulse
from coordinator.state import MemberStatus, Phase
from psyche_node.identity import load_or_create_node_key
from psyche_node.ipc import Message, Ok
from psyche_node.network.messages import PeerUp, SetMembers
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.node.membership import Membership
from psyche_node.node.roster import Roster

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

    def change(self, slot: int, **fields: Any) -> None:
        """Put this into another line of the table, or into one's own."""
        self.chain.list = tuple(dataclasses.replace(m, **fields) if m.slot == slot else m for m in self.chain.list)

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
    folder: Path,
    *errors: Exception,
    share: int = 0,
    peers: Iterable[int] = (0, 2, 3),
    begins: Pulse | None = None,
    applied: int = 0,
) -> AsyncIterator[Scene]:
    """``errors``: of the first attempts to say that it is ready. ``peers``: who is connected. ``begins``: the run as
    this member finds it; a warm-up if it is not given. ``applied``: rounds in its weights."""
    chain = ScriptedChain()
    chain.errors["ready"] = list(errors)
    stage = Scene(folder, chain)
    stage.replica.applied = applied
    journal = Journal(folder / "journal.jsonl")
    async with watching(chain) as view, child(stage.network) as (network, _):
        stage.roster = Roster(chain, view, network, member_of(ME).wallet, stage.key)  # type: ignore[arg-type]
        stage.it = Membership(chain, view, stage.roster, journal, stage.key, share, RUN)  # type: ignore[arg-type]
        for number in peers:
            stage.it.on_event(PeerUp(slot=number))
        chain.push(begins or pulse_of(Phase.WARMUP))
        await view.until(lambda pulse: True)
        assert await stage.it.join() == stage.roster.slot == ME
        tasks = [asyncio.create_task(part) for part in (stage.roster.follow(), stage.it.keep(stage.replica))]
        stage.following, stage.keeping = tasks
        try:
            yield stage
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            journal.close()
