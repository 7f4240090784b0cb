"""One node, from its settings to the end of the run: start the processes, check what the chain says, join, train."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from solders.pubkey import Pubkey

from coordinator.client import CoordinatorClient, Pulse
from coordinator.find_run import open_run
from coordinator.state import Run
from coordinator.ticking import tick_delay
from optimizer.layout import Layout
from psyche_node.evaluation import Results
from psyche_node.faults import Fault, Faults
from psyche_node.ipc import IpcError, Message
from psyche_node.metrics import ASK_SECONDS, NodeMetrics
from psyche_node.network.messages import (
    Configure,
    GetStats,
    Stats,
)
from psyche_node.network.store import BlobStore
from psyche_node.node.config import ConfigError, NodeConfig
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.folder import CHECKPOINT, keep_for_run
from psyche_node.node.funds import check_funds
from psyche_node.node.idle import IdleTasks
from psyche_node.node.journal import Journal
from psyche_node.node.keys import own_keys
from psyche_node.node.membership import Membership
from psyche_node.node.networking import Network
from psyche_node.node.outsider import intrude
from psyche_node.node.ranks import Trainer
from psyche_node.node.roster import Roster
from psyche_node.node.roundloop import Cadence, RoundLoop
from psyche_node.node.share import Share
from psyche_node.node.standing import check_in_time
from psyche_node.node.ticker import keep_ticking
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.terms import training_terms
from psyche_node.training.messages import Load, Loaded, Weights, WeightsAre

log = logging.getLogger(__name__)
LINGER_SECONDS = 30.0


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
    roster: Roster
    membership: Membership
    run: Run
    """As it was when model and data were loaded."""
    loaded: Loaded


class Node:
    """A member of one run."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._faults = Faults.parse(config.faults)
        self._wallet, self._node_key = own_keys(config)
        self._roster: Roster | None = None
        self._membership: Membership | None = None
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
        roster, membership = parts.roster, parts.membership
        if Fault.OUTSIDER in self._faults:
            background.append(tasks.create_task(roster.follow()))
            await intrude(parts.chain, parts.view, parts.network, parts.store)
            return
        check_in_time(run, self._config.model)
        member = await membership.join()
        background.append(tasks.create_task(roster.follow()))
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
            left_out=roster.look,
            loaded=parts.run,
            folder=self._config.folder,
            update_timeout=self._config.update_timeout,
        )
        background.append(tasks.create_task(membership.keep(loop)))
        await loop.run()
        await self._finish(parts, loop, member)

    @contextlib.asynccontextmanager
    async def _parts(self) -> AsyncIterator[_Parts]:
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            journal = Journal(config.folder / "journal.jsonl")
            stack.callback(journal.close)
            program, owner = (one if one is None else Pubkey.from_string(one) for one in (config.program, config.owner))
            chain = await open_run(
                config.rpc,
                config.run,
                self._wallet,
                program=program,
                owner=owner,
                commitment=config.commitment,
                priority_fee=config.priority_fee,
                priority_fee_cap=config.priority_fee_cap,
            )
            stack.push_async_callback(chain.close)
            run = (await chain.pulse()).run
            if not config.names_one_run:
                log.warning(
                    "run %r was searched for by its name, which anybody may give to another run; this node would then "
                    'not start again. For good, set run = "%s", or program = "%s" and owner = "%s" with the name',
                    *(config.run, chain.addresses.run, chain.program_id, run.owner),
                )
            if Fault.OUTSIDER not in self._faults:
                check_in_time(run, config.model)  # before it asks for funds, or loads a large model, for nothing
            await check_funds(chain, run, self._wallet.pubkey(), config.priority_fee)
            keep_for_run(config.folder, str(chain.addresses.run))
            trainer = await Trainer.start(config.training_ranks, config.folder / "logs", self._on_event)
            network = Network(self._on_event)
            stack.push_async_callback(_end, trainer, network)
            self._network = network
            if config.metrics is not None:
                self._serve_metrics(config.metrics, stack)
            log.info("run %s (%s): loading %s and %s", run.run_id, chain.addresses.run, config.model, config.data)
            loaded, ready = await asyncio.gather(
                trainer.call(self._load_message(run), Loaded),
                network.start(self._configure_message(str(chain.addresses.run))),
            )
            for reason in loaded.reasons:
                log.info("%s", reason)
            log.info("node %s serves its updates at %s", ready.node_id, ready.grpc_address)
            log.info("others may name it as bootstrap: %s", " or ".join(ready.multiaddrs))
            shapes = [(name, tuple(shape)) for name, shape in loaded.shapes]
            layout = Layout.build(shapes, run.terms.topk, only_bf16=loaded.precision == "bf16")
            store = BlobStore(config.folder / "blobs")
            exchange = self._exchange = UpdateExchange(network, store, layout, bytes(chain.addresses.run), journal)
            stack.push_async_callback(exchange.close)
            journal.write(
                "started",
                run=str(chain.addresses.run),
                wallet=str(self._wallet.pubkey()),
                node_id=ready.node_id,
                multiaddrs=ready.multiaddrs,
                device=loaded.device,
            )
            tasks = IdleTasks(config.tasks, trainer, chain, journal, config.folder, self._tell_results)
            await tasks.open()
            view = ChainView(chain)
            roster = self._roster = Roster(chain, view, network, self._wallet.pubkey(), self._node_key)
            membership = self._membership = Membership(chain, view, roster, journal, self._node_key, config.share, run)
            yield _Parts(
                chain, view, trainer, network, exchange, store, journal, tasks, roster, membership, run, loaded
            )

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
            model_root=run.terms.model_root.hex(),
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

    async def _finish(self, parts: _Parts, loop: RoundLoop, member: int) -> None:
        run = parts.view.pulse.run
        weights = await parts.trainer.call(Weights(), WeightsAre)
        loss = await loop.evaluate(run.final_rounds - 1)
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
        log.info(
            "the run is finished after %d rounds: held-out loss %s, weights %s, model in %s. For %.0f s others can "
            "still fetch from this node",
            run.final_rounds,
            "none: nothing is held out" if loss is None else f"{loss:.4f}",
            weights.sha256,
            self._config.folder / CHECKPOINT,
            LINGER_SECONDS,
        )
        await _linger()

    def _on_event(self, message: Message) -> None:
        if self._metrics is not None:
            self._metrics.on_event(message)
        if self._exchange is not None:
            self._exchange.on_event(message)
        if self._roster is not None:
            self._roster.on_event(message)
        if self._membership is not None:
            self._membership.on_event(message)

    def _tick_delay(self, pulse: Pulse) -> int:
        place = None if self._roster is None else self._roster.place
        return tick_delay(place, pulse.run.round, pulse.header.members)


async def _end(*parts: Trainer | Network) -> None:
    """End the processes, all at once: whoever asks a second time cancels all that is still waited for."""
    await asyncio.gather(*(part.stop() for part in parts))


async def _linger() -> None:
    """Let others fetch what they lack. This node is done: to be stopped meanwhile is no interruption."""
    try:
        await asyncio.sleep(LINGER_SECONDS)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
