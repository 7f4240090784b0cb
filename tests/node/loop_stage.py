"""The round loop as its tests see it: a scripted chain, an exchange that has everything, a trainer that says what it
is asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from node_stage import ScriptedChain, child, settle, settle_down, watching
from node_values import RUN, commitment, member_of, pulse_of, round_of

from coordinator.client import Pulse
from coordinator.state import Commitment, Phase, Run
from psyche_node.faults import Faults
from psyche_node.ipc import Message, Ok
from psyche_node.network.messages import GetStats, Stats
from psyche_node.network.store import BlobStore
from psyche_node.node.idle import IdleTasks
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.node.roundloop import Cadence, RoundLoop
from psyche_node.node.share import Share
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.training.messages import Applied, Apply, Evaluate, Evaluated, Root, RootIs, Save, Train, Trained

ME = 1
ROOT = "ab" * 32
ALL = [commitment(member) for member in range(4)]


class Everything:
    """Stands in for the exchange: every update is here."""

    def __init__(self) -> None:
        self.known: set[tuple[int, int]] = set()
        self.published: list[int] = []
        self.announced: list[tuple[int, int, bytes, int]] = []
        self.timeouts: set[float] = set()
        self.forgotten: list[int] = []

    async def follow(self, round: int, commitments: Iterable[Commitment]) -> None:
        self.known |= {(round, one.member) for one in commitments}

    def followed(self, round: int) -> frozenset[int]:
        return frozenset(member for number, member in self.known if number == round)

    async def obtain(self, round: int, members: Iterable[int], timeout: float) -> list[Path]:
        assert self.followed(round) >= set(members)
        self.timeouts.add(timeout)
        return [Path(f"{round}-{member}") for member in sorted(members)]

    async def publish(self, round: int, member: int, digest: bytes, length: int) -> None:
        self.published.append(round)
        self.announced.append((round, member, digest, length))

    async def forget(self, before: int) -> None:
        self.forgotten.append(before)


class Shares(Share):
    """The real one, which notes what it is told."""

    def __init__(self, chain: ScriptedChain) -> None:
        super().__init__(chain, 1000)  # type: ignore[arg-type]
        self.told: list[str] = []

    async def follow(self, tokens: int, seconds: float, most: int) -> None:
        self.told.append(f"follow {tokens} {most}")
        await super().follow(tokens, seconds, most)

    def missed(self) -> None:
        self.told.append("missed")
        super().missed()


class Tasks(IdleTasks):
    """No tasks, and a note of when they would have begun."""

    begun: list[int]

    async def begin(self, round: int) -> None:
        self.begun.append(round)


class Scene:
    """A loop under way, and what it asked of the training process, in order."""

    def __init__(self, folder: Path, chain: ScriptedChain, view: ChainView) -> None:
        self.chain, self.view = chain, view
        self.exchange = Everything()
        self.share = Shares(chain)
        self.store = BlobStore(folder / "blobs")
        self.begun: list[int] = []
        self.asked: list[Message] = []
        self.failing: set[type[Message]] = set()
        self.before: Callable[[Message], None] = lambda message: None
        self.journal = JournalReader(folder / "journal.jsonl")
        self.update = b"update"
        self.left_out = 0
        self.applied = Applied(fingerprint=7)
        self.evaluated = Evaluated(loss=1.0, tokens=5, seconds=0.1)
        self.task: asyncio.Task[None]

    def train(self, message: Message) -> Message:
        self.before(message)
        self.asked.append(message)
        if type(message) in self.failing:
            raise ValueError("not finite")
        match message:
            case Train():
                Path(message.out_path).write_bytes(self.update)
                return Trained(loss=1.0, tokens=5, seconds=0.1, fingerprint_before=7, gradient_norm=1.0)
            case Apply():
                return self.applied
            case Root():
                return RootIs(model_root=ROOT)
            case Evaluate():
                return self.evaluated
            case Save():
                return Ok()
        raise AssertionError(message)

    def leave_out(self) -> None:
        self.left_out += 1

    def did(self) -> list[str]:
        """train N, apply N (i: own included, b: own goes back, -: none of one's own), root, save N."""
        fates = {True: "i", False: "b", None: "-"}
        said = []
        for message in self.asked:
            match message:
                case Train():
                    said.append(f"train {message.round}")
                case Apply():
                    said.append(f"apply {message.round}{fates[message.included]}")
                case Save():
                    said.append(f"save {message.round}")
                case _:
                    said.append(type(message).__name__.lower())
        return said

    async def see(self, phase: Phase, round: int, did: list[str], **fields: Any) -> None:
        """Show the loop this state of the run, and check what it does about it."""
        self.asked.clear()
        now = range(max(0, round - 3), round + 1)
        self.chain.table = tuple(round_of(n, ALL if n < round else (), closed=n < round) for n in now)
        self.chain.push(pulse_of(phase, round, **fields))
        await settle(lambda: len(self.asked) >= len(did) or self.task.done())
        if self.task.done() and phase is not Phase.FINISHED:
            self.task.result()
        await settle_down()
        assert self.did() == did


@contextlib.asynccontextmanager
async def scene(
    folder: Path,
    *,
    begins: Pulse | None = None,
    cadence: Cadence = Cadence(evaluate=0, check=0),  # noqa: B008
    faults: Faults = Faults(),  # noqa: B008
    loaded: Run = RUN,
) -> AsyncIterator[Scene]:
    """``begins``: the run when the loop starts, a warm-up if it is not given; ``loaded``: when the model was loaded."""
    chain = ScriptedChain()
    chain.list = tuple(member_of(slot) for slot in range(4))

    def network(message: Message) -> Message:
        if isinstance(message, GetStats):
            return Stats(
                bytes_sent=0,
                bytes_received=0,
                blob_bytes_sent=0,
                blob_bytes_received=0,
                peers=0,
                connected=[],
                per_peer=[],
            )
        return Ok()

    async with watching(chain) as view:
        it = Scene(folder, chain, view)
        async with child(it.train) as (trainer, _), child(network) as (net, _):
            journal = Journal(folder / "journal.jsonl")
            chain.push(begins or pulse_of(Phase.WARMUP))
            await view.until(lambda pulse: True)
            tasks = Tasks((), trainer, chain, journal, folder)  # type: ignore[arg-type]
            tasks.begun = it.begun
            loop = RoundLoop(
                chain=chain,  # type: ignore[arg-type]
                view=view,
                witness=Witness(chain, view, it.exchange, ME),  # type: ignore[arg-type]
                exchange=it.exchange,  # type: ignore[arg-type]
                trainer=trainer,
                network=net,
                store=it.store,
                journal=journal,
                faults=faults,
                share=it.share,
                cadence=cadence,
                tasks=tasks,
                run_key=bytes(32),
                member=ME,
                left_out=it.leave_out,
                loaded=loaded,
                folder=folder,
                update_timeout=5.0,
            )
            it.task = asyncio.create_task(loop.run())
            try:
                yield it
            finally:
                it.task.cancel()
                await asyncio.gather(it.task, return_exceptions=True)
                journal.close()
