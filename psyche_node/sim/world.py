"""A whole network on this machine: a ledger, the program, a run, its nodes and its adversaries, all as processes.

What the nodes share is the RPC address and one bootstrap address. Everything the simulation learns, it learns from the
chain and from the nodes' journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import TransferParams
from solders.system_program import transfer as system_transfer

from coordinator.client import ChainUnavailable, CoordinatorClient, Pulse
from coordinator.deploy import deploy
from coordinator.instructions import DEFAULT_SHARE, run_addresses
from coordinator.program import program_bytes
from coordinator.state import Member, Phase, Round
from coordinator.wallet import load_or_create_keypair
from psyche_node.endings import how_it_ended
from psyche_node.exits import Exit
from psyche_node.faults import Fault
from psyche_node.identity import load_or_create_node_key
from psyche_node.node.journal import JournalReader
from psyche_node.sim.out import LOGS
from psyche_node.sim.processes import Managed, MemoryWatch
from psyche_node.sim.settings import Prepared, SimSettings

LAMPORTS_PER_SOL = 1_000_000_000
NODE_FUNDS = LAMPORTS_PER_SOL // 20
OWNER_FUNDS = 100 * LAMPORTS_PER_SOL
OWNER_NEEDS = 2 * LAMPORTS_PER_SOL
LEDGER_TIMEOUT = 30.0
RELAY_TIMEOUT = 30.0
HOST = "127.0.0.1"
# Of a node: libp2p, gRPC, bulk.
PORTS = 3
PREPARE_TIMEOUT = 600.0
POLL_SECONDS = 0.25
FINISH_SECONDS = 300.0


class SimulationFailed(Exception):
    """The network could not be started or did not finish; the message says which part and where its log is."""


@dataclass(frozen=True, slots=True)
class Place:
    """The ports of a node, and those that the others reach them by; 0 is its own choice."""

    p2p: int = 0
    grpc: int = 0
    bulk: int = 0
    announced_p2p: int = 0
    announced_grpc: int = 0
    announced_bulk: int = 0


@dataclass(slots=True)
class SimNode:
    """One node of the simulation and what its journal has said so far."""

    name: str
    index: int
    wallet: str
    node_id: str
    process: Managed
    journal: JournalReader
    fault: Fault | None = None
    killed: bool = False
    ended_at: float | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def last(self, kind: str) -> dict[str, Any] | None:
        return next((line for line in reversed(self.lines) if line["kind"] == kind), None)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be expected of it."""
        return self.fault is Fault.OUTSIDER or not self.process.running or self.last("finished") is not None


@dataclass(slots=True)
class ChainRecord:
    """What the simulation saw on chain."""

    rounds_started: dict[int, float] = field(default_factory=dict)
    included: dict[int, frozenset[int] | None] = field(default_factory=dict)
    committed: dict[int, frozenset[int]] = field(default_factory=dict)
    active: dict[int, frozenset[int]] = field(default_factory=dict)
    positions: dict[int, list[int]] = field(default_factory=dict)
    finished_at: float | None = None
    pulse: Pulse | None = None
    members: tuple[Member, ...] = ()

    def see(self, pulse: Pulse, rounds: tuple[Round, ...], members: tuple[Member, ...]) -> None:
        now = time.time()
        self.pulse, self.members = pulse, members
        if pulse.run.phase is Phase.FINISHED and self.finished_at is None:
            self.finished_at = now
        for inclusion in pulse.run.inclusion:
            self.included[inclusion.round] = None if inclusion.void else inclusion.members
        for record in rounds:
            # A round that began and ended between two looks is known from here.
            self.rounds_started.setdefault(record.round, now)
            self.positions[record.round] = [
                position for start, count in record.ranges for position in range(start, start + count)
            ]
            self.committed[record.round] = frozenset(record.commitments)
            self.active[record.round] = record.active


class World:
    """Starts everything, follows it, and ends it."""

    def __init__(self, settings: SimSettings, started: float) -> None:
        self.settings, self.started = settings, started
        self.ledger: Managed | None = None
        """The simulation's own ledger; None on a chain of the user's."""
        self.relay: Managed | None = None
        """What gives the nodes their lines; None without ``--link``."""
        self.nodes: list[SimNode] = []
        self.record = ChainRecord()
        self.memory = MemoryWatch()
        self.run_id = f"sim-{int(started)}"
        self.prepared: Prepared
        self.chain: CoordinatorClient
        self.rpc = ""
        self.node_rpc: list[str] = []
        """The endpoints that the nodes use, the preferred one first."""
        self.funded = 0
        """Lamports that the owner's wallet began with; all others are funded from it."""
        self.worth_keeping = False
        """Whether the output folder holds what is not to be lost: nodes, or keys to what is on the user's chain, or the
        logs of a failure that its message does not explain."""

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """The network is up inside, and nothing of it is left outside, whatever happens."""
        async with contextlib.AsyncExitStack() as stack:
            if self.settings.rpc is None:
                await self._prepare_and_found(stack)
            else:  # data that cannot be prepared costs the user nothing
                self.prepared = await self._prepare()
                await self._found(stack)
            await self._open_lines(stack)
            await self._create_run()
            self.worth_keeping = True
            stack.push_async_callback(self.stop_nodes)
            for index in range(self.settings.nodes + len(self.settings.adversaries)):
                await self._start_node(index)
            yield

    async def _prepare_and_found(self, stack: contextlib.AsyncExitStack) -> None:
        """Both at once, on a ledger of its own."""
        try:
            async with asyncio.TaskGroup() as tasks:
                preparing = tasks.create_task(self._prepare())
                await self._found(stack)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        self.prepared = preparing.result()

    async def _prepare(self) -> Prepared:
        arguments = [self.settings.model_dump_json()]
        log = self.settings.out / LOGS / "prepare.log"
        process = Managed("preparation", "psyche_node.sim.prepare", arguments, log, pipe=True)
        remedy = "; what takes longer is prepared beforehand, by `psyche-node data prepare`"
        try:
            return Prepared.model_validate_json(await process.first_line(PREPARE_TIMEOUT, remedy))
        finally:
            await process.stop()

    async def _ledger(self, stack: contextlib.AsyncExitStack) -> str:
        """Return the RPC address of the user's chain, or start a ledger and return its address."""
        settings = self.settings
        if settings.rpc is not None:
            self.node_rpc = [settings.rpc]
            return settings.rpc
        arguments = ["run", "--port", str(settings.port), "--slot-ms", str(settings.slot_ms)]
        if settings.chain_faults:
            # The last endpoint is the simulation's own, and without faults: it reports what is so.
            for faults in (*settings.chain_faults, ""):
                arguments += ["--faults", faults]
        log = settings.out / LOGS / "ledger.log"
        ledger = self.ledger = Managed("psyche-ledger", "coordinator.ledger", arguments, log, pipe=True)
        stack.push_async_callback(ledger.stop)
        self.memory.watch("ledger", ledger.process.pid)
        ready = json.loads(await ledger.first_line(LEDGER_TIMEOUT))
        addresses = [str(endpoint["rpc"]) for endpoint in ready["endpoints"]]
        self.node_rpc = addresses[:-1] or addresses
        return addresses[-1]

    async def _found(self, stack: contextlib.AsyncExitStack) -> None:
        """Deploy the program through the upgradeable loader, paid by the owner's wallet."""
        self.rpc = await self._ledger(stack)
        self.owner = load_or_create_keypair(self.settings.wallet or self.settings.out / "owner.json")
        program = load_or_create_keypair(self.settings.out / "program.json")
        self.addresses = run_addresses(program.pubkey(), self.owner.pubkey(), self.run_id)
        self.chain = CoordinatorClient([self.rpc], program.pubkey(), self.addresses, self.owner)
        stack.push_async_callback(self.chain.close)
        if self.settings.rpc is None:
            await self.chain.airdrop(self.owner.pubkey(), OWNER_FUNDS)
        self.funded = await self.chain.balance(self.owner.pubkey())
        if self.funded < OWNER_NEEDS:
            raise SimulationFailed(
                f"wallet {self.owner.pubkey()} has {self.funded / LAMPORTS_PER_SOL:g} SOL on {self.rpc}; a run needs "
                f"{OWNER_NEEDS / LAMPORTS_PER_SOL:g}, most of it deposits. Fund it: "
                "psyche-admin ledger airdrop, or transfer"
            )
        self.worth_keeping = self.settings.rpc is not None
        await deploy(self.chain, self.owner, program, program_bytes())

    async def _open_lines(self, stack: contextlib.AsyncExitStack) -> None:
        """Choose where the nodes listen, and put a relay in front of them if they are to have lines."""
        count = self.settings.nodes + len(self.settings.adversaries)
        if self.settings.link is None:
            # The others know the first one's address beforehand; all choose their other ports themselves.
            first = _reserve(stack)
            self.places = [Place(first, announced_p2p=first), *(Place() for _ in range(1, count))]
            return
        ports = [tuple(_reserve(stack) for _ in range(PORTS)) for _ in range(count)]
        arguments = ["--link", self.settings.link]
        for own in ports:
            arguments += ["--to", ",".join(f"{HOST}:{port}" for port in own)]
        log = self.settings.out / LOGS / "relay.log"
        relay = self.relay = Managed("relay", "psyche_node.relay", arguments, log, pipe=True)
        stack.push_async_callback(relay.stop)
        lines = iter(json.loads(await relay.first_line(RELAY_TIMEOUT)))
        ends = [int(line["at"].rpartition(":")[2]) for line in lines]
        self.places = [Place(*own, *ends[PORTS * index : PORTS * (index + 1)]) for index, own in enumerate(ports)]

    async def _create_run(self) -> None:
        settings, prepared = self.settings, self.prepared
        await self.chain.create_run(self.run_id, settings.limits(), settings.terms(prepared))

    async def _start_node(self, index: int) -> SimNode:
        settings, prepared = self.settings, self.prepared
        honest = index < settings.nodes
        fault = None if honest else settings.adversaries[index - settings.nodes]
        name = f"node-{index}" if fault is None else f"{fault}-{index}"
        folder = settings.out / "nodes" / name
        shutil.copytree(prepared.model, folder / "model")
        shutil.copytree(prepared.data, folder / "data")
        wallet = load_or_create_keypair(folder / "wallet.json")
        key = load_or_create_node_key(folder / "node.key")
        await self.chain.send(transfer(self.owner.pubkey(), wallet.pubkey(), NODE_FUNDS))
        place = self.places[index]
        if index == 0:
            self.bootstrap = f"/ip4/{HOST}/tcp/{place.announced_p2p}/p2p/{key.node_id}"
        arguments = {
            "--name": name,
            "--run": str(self.addresses.run),
            "--folder": str(folder),
            "--model": str(folder / "model"),
            "--data": str(folder / "data"),
            "--p2p-port": str(place.p2p),
            "--grpc-port": str(place.grpc),
            "--bulk-port": str(place.bulk),
            "--device": settings.device,
            "--ranks": str(settings.ranks_of(index).ranks),
            "--tensor-parallel": str(settings.ranks_of(index).tensor_parallel),
            "--threads": str(settings.threads_of(index)),
            "--micro-batch": str(settings.micro_batch_of(index)),
            # The nodes share this machine's cores: who happens to run alone would measure itself to be fast.
            "--share": str(DEFAULT_SHARE),
            "--check-every": str(settings.check_every),
            "--evaluate-every": str(settings.evaluate_every if index == 0 else 0),
        }
        if place.announced_grpc:
            arguments["--announce-p2p"] = f"{HOST}:{place.announced_p2p}"
            arguments["--announce-grpc"] = f"{HOST}:{place.announced_grpc}"
            arguments["--announce-bulk"] = f"{HOST}:{place.announced_bulk}"
        if settings.nodes - settings.private <= index < settings.nodes:
            arguments["--reachable"] = "no"
        if index > 0:
            arguments["--bootstrap"] = self.bootstrap
        if fault is not None:
            arguments["--fault"] = str(fault)
        flags = [part for pair in arguments.items() for part in pair]
        for rpc in self.node_rpc:
            flags += ["--rpc", rpc]
        for task in settings.tasks if index == 0 else ():
            flags += ["--tasks", str(task)]
        process = Managed(name, "psyche_node.cli", ["run", *flags], settings.out / LOGS / f"{name}.log")
        self.memory.watch(name, process.process.pid)
        node = SimNode(
            name=name,
            index=index,
            wallet=str(wallet.pubkey()),
            node_id=key.node_id,
            process=process,
            journal=JournalReader(folder / "journal.jsonl"),
            fault=fault,
        )
        self.nodes.append(node)
        return node

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Return when the run is finished and every node that still runs has said so, or has had time to.

        Raises SimulationFailed when ledger, relay or all honest nodes have ended, or too many for the run to begin.
        """
        watcher = asyncio.create_task(self._watch_chain())
        try:
            while True:
                self._look(on_change)
                if self.record.finished_at is not None and (
                    all(node.done for node in self.nodes) or time.time() > self.record.finished_at + FINISH_SECONDS
                ):
                    return
                self._check_alive()
                if watcher.done():
                    watcher.result()
                await asyncio.sleep(POLL_SECONDS)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def stop_nodes(self) -> None:
        """SIGTERM every node, wait for all of them, and read the last of their journals."""
        await asyncio.gather(*(node.process.stop() for node in self.nodes))
        for node in self.nodes:
            node.lines += node.journal.read()

    def _look(self, on_change: Callable[[], None]) -> None:
        """Read the journals, carry out the kills that are due, and measure memory."""
        for node in self.nodes:
            node.lines += node.journal.read()
            if not node.process.running and node.ended_at is None:
                node.ended_at = time.time()
        pulse = self.record.pulse
        for kill in self.settings.kills:
            node = self.nodes[kill.node]
            if (
                pulse is not None
                and pulse.run.phase is Phase.ROUND_TRAIN
                and pulse.run.round >= kill.round
                and not node.killed
            ):
                node.killed = True
                node.process.kill()
        self.memory.sample()
        on_change()

    async def _watch_chain(self) -> None:
        async for pulse in self.chain.watch():
            before = self.record.pulse
            if before is not None and before.run == pulse.run and before.header.committed == pulse.header.committed:
                self.record.pulse = pulse
                continue
            try:
                rounds, members = await asyncio.gather(self.chain.rounds(), self.chain.members())
            except ChainUnavailable:
                continue  # the next state comes when the chain is back
            self.record.see(pulse, rounds, members)

    def _check_alive(self) -> None:
        """Raise SimulationFailed when the run cannot go on any more."""
        for needed, what in ((self.ledger, "ledger"), (self.relay, "relay")):
            if needed is not None and not needed.running:
                raise SimulationFailed(f"the {what} has ended.\n{_last_words(needed)}")
        if not any(node.process.running for node in self.nodes if node.fault is None):
            ended = "every honest node has ended before the run was finished"
        else:
            limits = self.settings.limits()
            wanted = {Phase.WAITING_FOR_MEMBERS: limits.init_min_members, Phase.WARMUP: limits.min_members}
            phase = None if self.record.pulse is None else self.record.pulse.run.phase
            alive = sum(node.process.running for node in self.nodes if node.fault is not Fault.OUTSIDER)
            if phase is None or alive >= wanted.get(phase, 0):
                return
            ended = f"the run waits for {wanted[phase]} members, and only {alive} nodes are left"
        parts = [_last_words(node.process) for node in self.nodes if not node.process.running]
        raise SimulationFailed(f"{ended}.\n" + "\n".join(parts))


def _last_words(process: Managed) -> str:
    how = how_it_ended(process.process.returncode, {code.value: code.meaning for code in Exit})
    return f"{process.name}: {how}. Its log, {process.log}, ends with\n{process.tail()}"


def transfer(source: Pubkey, to: Pubkey, lamports: int) -> Instruction:
    return system_transfer(TransferParams(from_pubkey=source, to_pubkey=to, lamports=lamports))


def _reserve(stack: contextlib.AsyncExitStack) -> int:
    """Return a free port that nobody else is given: it stays bound here, and a node can listen on it all the same."""
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    return int(sock.getsockname()[1])
