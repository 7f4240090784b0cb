"""One node, from its settings to the end of the run: start the processes, check what the chain says, join, train."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from solders.keypair import Keypair

from coordinator.client import CoordinatorClient, ProgramError, Pulse
from coordinator.errors import ErrorCode
from coordinator.instructions import DEFAULT_SHARE
from coordinator.state import Member, MemberStatus, Phase, Run
from coordinator.ticking import tick_delay
from coordinator.wallet import load_or_create_keypair
from optimizer.layout import Layout
from psyche_node.evaluation import Results
from psyche_node.faults import Fault, Faults
from psyche_node.identity import NodeKey, load_or_create_node_key, node_id
from psyche_node.ipc import IpcError, Message, Ok
from psyche_node.metrics import ASK_SECONDS, NodeMetrics
from psyche_node.network.messages import (
    Configure,
    GetStats,
    MemberEntry,
    PeerDown,
    PeerUp,
    Rejected,
    SetMembers,
    Stats,
    Why,
)
from psyche_node.network.store import BlobStore
from psyche_node.node.changes import Changes
from psyche_node.node.config import ConfigError, NodeConfig
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.funds import check_funds
from psyche_node.node.idle import IdleTasks
from psyche_node.node.journal import Journal
from psyche_node.node.networking import Network
from psyche_node.node.outsider import intrude
from psyche_node.node.ranks import Trainer
from psyche_node.node.roundloop import Cadence, RoundLoop, TermsChanged
from psyche_node.node.share import Share
from psyche_node.node.ticker import keep_ticking
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.terms import training_terms
from psyche_node.training.messages import Load, Loaded, Weights, WeightsAre

log = logging.getLogger(__name__)
MEET_SECONDS = 10.0
LINGER_SECONDS = 30.0
# The member table is read again when a peer is refused that is not in it, but not sooner than after this pause; and
# after this time anyway.
MEMBERS_PAUSE_SECONDS = 2.0
MEMBERS_SECONDS = 120.0

_LIVE = (MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED)


class JoinRefused(Exception):
    """The run does not take this node; the message says why and what to do."""


@dataclass(slots=True)
class _Parts:
    """What a running node is made of, once everything has started."""

    chain: CoordinatorClient
    view: ChainView
    trainer: Trainer
    network: Network
    exchange: UpdateExchange
    store: BlobStore
    journal: Journal
    tasks: IdleTasks
    run: Run
    """As it was when model and data were loaded."""
    loaded: Loaded


class Node:
    """A member of one run."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._faults = Faults.parse(config.faults)
        self._wallet: Keypair = load_or_create_keypair(config.wallet_path)
        self._node_key: NodeKey = load_or_create_node_key(config.node_key_path)
        self._member: int | None = None
        self._connected: set[int] = set()
        self._peers = Changes()
        self._unknown_peer = asyncio.Event()
        self._exchange: UpdateExchange | None = None
        self._network: Network | None = None
        self._metrics: NodeMetrics | None = None

    async def run(self) -> None:
        """Take part until the run is finished. Cancel to stop early; child processes end with this call."""
        async with self._parts() as parts, asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(parts.view.follow(self._tick_delay)),
                tasks.create_task(keep_ticking(parts.chain, parts.view, self._tick_delay)),
                tasks.create_task(parts.trainer.died()),
                tasks.create_task(parts.network.keep()),
            ]
            await self._take_part(parts, tasks, background)
            for task in background:
                task.cancel()

    async def _take_part(self, parts: _Parts, tasks: asyncio.TaskGroup, background: list[asyncio.Task[None]]) -> None:
        run = (await parts.view.until(lambda pulse: True)).run
        self._check_terms(run, parts.loaded)
        if Fault.OUTSIDER in self._faults:
            background.append(tasks.create_task(self._follow_members(parts)))
            await intrude(parts.chain, parts.view, parts.network, parts.store)
            return
        if run.checkpoint_root != run.terms.model_root:
            raise JoinRefused(
                f"the run stands at round {run.round} and its members have trained the model since round "
                f"{run.model_round}; this version can join at the beginning only"
            )
        member = self._member = await self._join(parts)
        background.append(tasks.create_task(self._follow_members(parts)))
        await self._get_ready(parts, member)
        witness = Witness(parts.chain, parts.view, parts.exchange, member)
        background.append(tasks.create_task(witness.run()))
        loop = RoundLoop(
            chain=parts.chain,
            view=parts.view,
            witness=witness,
            exchange=parts.exchange,
            trainer=parts.trainer,
            network=parts.network,
            store=parts.store,
            journal=parts.journal,
            faults=self._faults,
            share=Share(parts.chain, self._config.share),
            cadence=Cadence(evaluate=self._config.evaluate_every, check=self._config.check_every),
            tasks=parts.tasks,
            run_key=bytes(parts.chain.addresses.run),
            member=member,
            loaded=parts.run,
            folder=self._config.folder,
            update_timeout=self._config.update_timeout,
        )
        await loop.run()
        await self._finish(parts, loop, member)

    @contextlib.asynccontextmanager
    async def _parts(self) -> AsyncIterator[_Parts]:
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            journal = Journal(config.folder / "journal.jsonl")
            stack.callback(journal.close)
            chain = await CoordinatorClient.open(
                config.rpc,
                config.run,
                self._wallet,
                commitment=config.commitment,
                priority_fee=config.priority_fee,
                priority_fee_cap=config.priority_fee_cap,
            )
            stack.push_async_callback(chain.close)
            await check_funds(chain, self._wallet.pubkey(), config.priority_fee)
            trainer = await Trainer.start(config.training_ranks, config.folder / "logs", self._on_event)
            stack.push_async_callback(trainer.stop)
            network = Network(self._on_event)
            stack.push_async_callback(network.stop)
            self._network = network
            if config.metrics is not None:
                self._serve_metrics(config.metrics, stack)
            run = (await chain.pulse()).run
            loaded, ready = await asyncio.gather(
                trainer.call(self._load_message(run), Loaded),
                network.start(self._configure_message(str(chain.addresses.run))),
            )
            for reason in loaded.reasons:
                log.info("%s", reason)
            log.info("node %s listens on %s (updates: %s)", ready.node_id, ready.multiaddrs, ready.grpc_address)
            shapes = [(name, tuple(shape)) for name, shape in loaded.shapes]
            layout = Layout.build(shapes, run.terms.topk, only_bf16=loaded.precision == "bf16")
            store = BlobStore(config.folder / "blobs")
            exchange = self._exchange = UpdateExchange(network, store, layout, bytes(chain.addresses.run), journal)
            stack.push_async_callback(exchange.close)
            journal.write(
                "started",
                wallet=str(self._wallet.pubkey()),
                node_id=ready.node_id,
                multiaddrs=ready.multiaddrs,
                device=loaded.device,
            )
            tasks = IdleTasks(config.tasks, trainer, chain, journal, config.folder, self._tell_results)
            await tasks.open()
            yield _Parts(chain, ChainView(chain), trainer, network, exchange, store, journal, tasks, run, loaded)

    def _tell_results(self, results: Results) -> None:
        if self._metrics is not None:
            self._metrics.on_results(results)

    def _serve_metrics(self, address: str, stack: contextlib.AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()

        def ask() -> Stats:
            network = self._network
            if network is None or network.process_id is None:
                raise IpcError("the network process is not running")
            asked = asyncio.run_coroutine_threadsafe(network.call(GetStats(), Stats), loop)
            try:
                return asked.result(ASK_SECONDS)
            finally:
                asked.cancel()

        self._metrics = NodeMetrics(ask)
        stack.enter_context(self._metrics.served(address))
        log.info("metrics are served on http://%s/metrics", address)

    def _load_message(self, run: Run) -> Load:
        config = self._config
        return Load(
            model=str(config.model),
            data=str(config.data),
            terms=training_terms(run),
            device="cuda" if config.gpus else config.device,
            tensor_parallel=config.tensor_parallel,
            threads=config.threads,
            micro_batch=config.micro_batch,
            options=config.options,
            layout_digest=run.terms.layout_digest.hex(),
            data_manifest=run.terms.data_manifest.hex(),
            data_source=run.terms.data_source,
        )

    def _configure_message(self, run: str) -> Configure:
        config = self._config
        return Configure(
            folder=str(config.folder),
            node_key_path=str(config.node_key_path),
            listen_host=config.listen,
            p2p_port=config.p2p_port,
            grpc_port=config.grpc_port,
            bulk_port=config.bulk_port,
            announce_p2p=config.announce_p2p,
            announce_grpc=config.announce_grpc,
            announce_bulk=config.announce_bulk,
            bootstrap=list(config.bootstrap),
            mdns=config.mdns,
            reachable=config.reachable,
            run=run,
            faults=list(config.faults),
        )

    def _check_terms(self, run: Run, loaded: Loaded) -> None:
        terms = run.terms
        for what, here, there, fix in (
            (
                "the model root",
                loaded.model_root,
                terms.model_root.hex(),
                f"get the run's model into {self._config.model}",
            ),
            (
                "the data manifest",
                loaded.data_manifest,
                terms.data_manifest.hex(),
                f"get the run's data into {self._config.data}",
            ),
            (
                "the layout digest",
                loaded.layout_digest,
                terms.layout_digest.hex(),
                "use the run's model, precision auto, and this version's optimizer",
            ),
        ):
            if here != there:
                raise ConfigError(f"{what} of this node is {here}, the run's is {there}: {fix}")

    async def _join(self, parts: _Parts) -> int:
        mine = await self._my_record(parts)
        if mine is None:
            phase = parts.view.pulse.run.phase
            if phase not in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP):
                raise JoinRefused(f"the run is in {phase.name}; nodes join it while it waits for members")
            await parts.chain.join(self._node_key.keypair, self._config.share or DEFAULT_SHARE)
            mine = await self._my_record(parts)
            if mine is None:
                raise JoinRefused("the join was confirmed, yet the member table does not list this wallet")
        elif mine.node_key != self._node_key.public:
            mine = await self._go_on_under_new_key(parts, mine)
        log.info("member %d of run %s", mine.slot, parts.view.pulse.run.run_id)
        parts.journal.write("joined", member=mine.slot)
        return mine.slot

    async def _go_on_under_new_key(self, parts: _Parts, mine: Member) -> Member:
        """Join again: the program lets a member go on in its slot under another node key, until the run is finished."""
        old, new = node_id(mine.node_key), self._node_key.node_id
        phase = parts.view.pulse.run.phase
        if phase is Phase.FINISHED:
            raise JoinRefused(
                f"this wallet is member {mine.slot} under the node key {old}, and a finished run takes no other key "
                f"({new}). Start the node with {self._config.node_key_path} of that node"
            )
        log.warning("member %d of this wallet goes on under a new node key: %s instead of %s", mine.slot, new, old)
        await parts.chain.join(self._node_key.keypair, self._config.share or mine.next_share, mine.grant)
        parts.journal.write("rotated", member=mine.slot, old=old, new=new)
        again = await self._my_record(parts)
        if again is None or again.node_key != self._node_key.public:
            raise JoinRefused(
                f"the chain still lists another node key for member {mine.slot}. Does another node with this wallet "
                "run, too? Stop it, and start this one again"
            )
        return again

    async def _my_record(self, parts: _Parts) -> Member | None:
        wallet, table = self._wallet.pubkey(), await parts.view.read(parts.chain.members)
        return next((m for m in table if m.wallet == wallet and m.status in _LIVE), None)

    async def _get_ready(self, parts: _Parts, member: int) -> None:
        """Wait for Warmup, meet the other members, and say that this node has the run's model."""
        pulse = await parts.view.until(lambda p: p.run.phase is not Phase.WAITING_FOR_MEMBERS)
        if pulse.run.phase is not Phase.WARMUP:
            raise JoinRefused(f"the run went on to {pulse.run.phase.name} without this node")
        members = await parts.view.read(parts.chain.members)
        others = {m.slot for m in members if m.status is MemberStatus.PENDING} - {member}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MEET_SECONDS):
                while not self._connected >= others:
                    await self._peers.beyond(self._peers.version)
        if missing := others - self._connected:
            log.warning("not connected to members %s yet; they may be reached through others", sorted(missing))
        if TermsChanged.between(parts.run, parts.view.pulse.run):
            raise TermsChanged(parts.view.pulse.run)
        root = bytes.fromhex(parts.loaded.model_root)
        try:
            await parts.view.read(lambda: parts.chain.ready(root))
        except ProgramError as error:
            # An earlier attempt or life of this node may have said so, and the run gone on with it since. A member that
            # is out for another reason learns it when the round begins.
            if error.code not in (ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE):
                raise

    async def _follow_members(self, parts: _Parts) -> None:
        """Keep the network's list of members that of the chain."""
        known: list[MemberEntry] | None = None
        while True:
            seen = parts.view.pulse
            table = await parts.view.read(parts.chain.members)
            self._check_still_mine(table)
            members = _admitted(table)
            if members != known:
                await parts.network.call(SetMembers(members=members), Ok)
                known = members
            await self._members_may_have_changed(parts.view, _membership(seen))

    async def _members_may_have_changed(self, view: ChainView, seen: tuple[object, ...]) -> None:
        """Wait for a reason to read the member table again. That a member's node key changed shows in that table only:
        so it is read when somebody is refused for not being in it, and from time to time."""
        self._unknown_peer.clear()

        async def hinted() -> None:
            await asyncio.sleep(MEMBERS_PAUSE_SECONDS)
            await self._unknown_peer.wait()

        waiting = {asyncio.ensure_future(hinted()), asyncio.ensure_future(_membership_changes(view, seen))}
        try:
            done, _ = await asyncio.wait(waiting, timeout=MEMBERS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in waiting:
                task.cancel()

    def _check_still_mine(self, table: Sequence[Member]) -> None:
        """Raise JoinRefused once this node's slot goes on under another node key: another host has taken over."""
        mine = next((m for m in table if m.slot == self._member and m.wallet == self._wallet.pubkey()), None)
        if mine is not None and mine.node_key != self._node_key.public:
            raise JoinRefused(
                f"member {mine.slot} goes on under another node key, {node_id(mine.node_key)}: a node with this wallet "
                "was started elsewhere. The others refuse this one from now on; if that was not you, use `psyche-admin "
                "member leave`, and a new wallet"
            )

    async def _finish(self, parts: _Parts, loop: RoundLoop, member: int) -> None:
        run = parts.view.pulse.run
        weights = await parts.trainer.call(Weights(), WeightsAre)
        await loop.evaluate(run.final_rounds - 1)
        await parts.tasks.finish(run.final_rounds)
        stats = await parts.network.call(GetStats(), Stats)
        parts.journal.write(
            "finished",
            member=member,
            rounds=run.final_rounds,
            weights_sha256=weights.sha256,
            fingerprint=f"{weights.fingerprint:016x}",
            bytes_sent=stats.bytes_sent,
            bytes_received=stats.bytes_received,
            train_seconds=round(loop.train_seconds, 3),
            wait_seconds=round(loop.wait_seconds, 3),
        )
        log.info("the run is finished after %d rounds; weights %s", run.final_rounds, weights.sha256)
        await asyncio.sleep(LINGER_SECONDS)

    def _on_event(self, message: Message) -> None:
        if self._metrics is not None:
            self._metrics.on_event(message)
        if isinstance(message, PeerUp):
            self._connected.add(message.slot)
            self._peers.fire()
        elif isinstance(message, PeerDown):
            self._connected.discard(message.slot)
            self._peers.fire()
        if self._exchange is not None:
            self._exchange.on_event(message)
        if isinstance(message, Rejected) and message.why is Why.NOT_A_MEMBER:
            self._unknown_peer.set()

    def _tick_delay(self, pulse: Pulse) -> int:
        return tick_delay(self._member, pulse.run.round, pulse.header.members)


def _admitted(table: Sequence[Member]) -> list[MemberEntry]:
    """The members that the network is for: the live ones, and those dropped, which go on following.

    The program keeps a node key for one member only while that one is live: later another wallet may join with it, and
    the key is that member's.
    """
    by_key = {m.node_key: m for m in table if m.status is MemberStatus.DROPPED}
    by_key |= {m.node_key: m for m in table if m.status in _LIVE}
    members = sorted(by_key.values(), key=lambda m: m.slot)
    return [MemberEntry(slot=m.slot, node_key=m.node_key.hex(), wallet=str(m.wallet)) for m in members]


def _membership(pulse: Pulse) -> tuple[object, ...]:
    gathering = pulse.run.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
    return (pulse.run.phase if gathering else None, pulse.header.members, pulse.header.active)


async def _membership_changes(view: ChainView, seen: tuple[object, ...]) -> None:
    await view.until(lambda pulse: _membership(pulse) != seen)
