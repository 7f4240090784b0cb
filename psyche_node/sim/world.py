"""A whole network on this machine: a ledger, the program, a run, its nodes and its adversaries, all as processes.

What the nodes share is the RPC address and one bootstrap address. Everything the simulation learns, it learns from the
chain and from the nodes' journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable

from solders.system_program import TransferParams, transfer

from coordinator.addresses import run_addresses
from coordinator.client import ChainUnavailable, CoordinatorClient
from coordinator.deploy import deploy
from coordinator.program import program_bytes
from coordinator.state import Phase
from coordinator.wallet import load_or_create_keypair
from psyche_node.endings import how_it_ended
from psyche_node.exits import Exit
from psyche_node.faults import Fault
from psyche_node.identity import load_or_create_node_key
from psyche_node.node.journal import JournalReader
from psyche_node.sim.chain_record import ChainRecord
from psyche_node.sim.node import HOST, PORTS, Place, SimNode, fault_of, node_flags, reserve_port
from psyche_node.sim.out import LOGS
from psyche_node.sim.processes import Managed, MemoryWatch, said
from psyche_node.sim.settings import Prepared, SimSettings

LAMPORTS_PER_SOL = 1_000_000_000
NODE_FUNDS = LAMPORTS_PER_SOL // 20
OWNER_FUNDS = 100 * LAMPORTS_PER_SOL
OWNER_NEEDS = 2 * LAMPORTS_PER_SOL
LEDGER_TIMEOUT = 30.0
RELAY_TIMEOUT = 30.0
PREPARE_TIMEOUT = 600.0
POLL_SECONDS = 0.25
FINISH_SECONDS = 300.0


class SimulationFailed(Exception):
    """The network could not be started or did not finish; the message says which part and where its log is."""


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
            first = reserve_port(stack)
            self.places = [Place(first, announced_p2p=first), *(Place() for _ in range(1, count))]
            return
        ports = [tuple(reserve_port(stack) for _ in range(PORTS)) for _ in range(count)]
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

    async def _start_node(self, index: int) -> None:
        settings, prepared = self.settings, self.prepared
        fault = fault_of(settings, index)
        name = f"node-{index}" if fault is None else f"{fault}-{index}"
        folder = settings.out / "nodes" / name
        shutil.copytree(prepared.model, folder / "model")
        shutil.copytree(prepared.data, folder / "data")
        wallet = load_or_create_keypair(folder / "wallet.json")
        key = load_or_create_node_key(folder / "node.key")
        owner = self.owner.pubkey()
        funds = TransferParams(from_pubkey=owner, to_pubkey=wallet.pubkey(), lamports=NODE_FUNDS)
        await self.chain.send(transfer(funds))
        place = self.places[index]
        if index == 0:
            self.bootstrap = f"/ip4/{HOST}/tcp/{place.announced_p2p}/p2p/{key.node_id}"
        flags = node_flags(settings, index, name, folder, place)
        flags += ["--run", str(self.addresses.run)]
        if index > 0:
            flags += ["--bootstrap", self.bootstrap]
        for rpc in self.node_rpc:
            flags += ["--rpc", rpc]
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
    return f"{process.name}: {how}. Its log, {process.log}, ends with\n{said(process.tail())}"
