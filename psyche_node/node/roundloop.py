"""The round loop: the one place where chain, network, data and training meet.

    assignment -> batch -> train -> blob -> commit -> announce        (this member's update, going out)
    inclusion set -> blobs -> apply                                   (everybody's updates, coming in)

One direction, one round after the other. The witness duty and the ticks run beside it as tasks of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from coordinator.client import CoordinatorClient, ProgramError, Pulse
from coordinator.state import InclusionSet, Phase, Round
from psyche_node.faults import Faults
from psyche_node.ipc import Endpoint, Ok, RemoteFailure
from psyche_node.network.messages import GetStats, Stats
from psyche_node.network.store import BlobStore
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.journal import Journal
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.training.messages import Applied, Apply, Evaluate, Evaluated, Root, RootIs, Save, Train, Trained

log = logging.getLogger(__name__)
KEPT_ROUNDS = 4


class Desynced(Exception):
    """This replica cannot follow the run any more; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every how many rounds something is done; 0 is never."""

    evaluate: int
    check: int

    def evaluates(self, round_number: int) -> bool:
        return self.evaluate > 0 and round_number % self.evaluate == 0

    def checks(self, round_number: int) -> bool:
        return self.check > 0 and round_number % self.check == 0


class RoundLoop:
    """One member's part in every round until the run is finished."""

    def __init__(
        self,
        *,
        chain: CoordinatorClient,
        view: ChainView,
        witness: Witness,
        exchange: UpdateExchange,
        trainer: Endpoint,
        network: Endpoint,
        store: BlobStore,
        journal: Journal,
        faults: Faults,
        cadence: Cadence,
        run_key: bytes,
        member: int,
        folder: Path,
        update_timeout: float,
    ) -> None:
        self._chain, self._view, self._witness, self._exchange = chain, view, witness, exchange
        self._trainer, self._network, self._store, self._journal, self._faults = (
            trainer,
            network,
            store,
            journal,
            faults,
        )
        self._cadence, self._run_key, self._member = cadence, run_key, member
        self._folder, self._update_timeout = folder, update_timeout
        self._applied = 0
        self._trained = -1
        self._only_follows = False
        self._sent: set[int] = set()
        self._checkpointed = -1
        self.train_seconds = 0.0
        self.wait_seconds = 0.0

    async def run(self) -> None:
        """Return when the run is finished and everything final has been applied.

        Raises Desynced, UpdateMissing, or what chain and processes raise when they are gone for good.
        """
        waiting_since = time.monotonic()
        while True:
            pulse = await self._view.until(self._has_work)
            if self._trained >= 0:
                self.wait_seconds += time.monotonic() - waiting_since
            await self._apply_final(pulse)
            run = pulse.run
            if run.phase is Phase.ROUND_TRAIN and run.round > self._trained:
                await self._train(pulse)
                self._trained = run.round
            elif run.phase is Phase.COOLDOWN and run.round > self._checkpointed:
                await self._checkpoint(run.round)
            elif run.phase is Phase.FINISHED:
                return
            waiting_since = time.monotonic()

    def _has_work(self, pulse: Pulse) -> bool:
        run = pulse.run
        return (
            run.phase is Phase.FINISHED
            or run.final_rounds > self._applied
            or (run.phase is Phase.ROUND_TRAIN and run.round > self._trained)
            or (run.phase is Phase.COOLDOWN and run.round > self._checkpointed)
        )

    async def _apply_final(self, pulse: Pulse) -> None:
        final = {inclusion.round: inclusion for inclusion in pulse.run.inclusion}
        while self._applied < pulse.run.final_rounds:
            inclusion = final.get(self._applied)
            if inclusion is None:
                raise Desynced(
                    f"the inclusion set of round {self._applied} is no longer on chain (the run is in round "
                    f"{pulse.run.round}): this node was away for too long. Start it again with the newest checkpoint"
                )
            await self._apply(inclusion)
            self._applied += 1

    async def _apply(self, inclusion: InclusionSet) -> None:
        number = inclusion.round
        members = frozenset() if inclusion.void else inclusion.members
        started = time.monotonic()
        if members:
            await self._exchange.follow(number, (await self._record(number)).commitments.values())
        paths = await self._exchange.obtain(number, members, self._update_timeout)
        included = self._member in members if number in self._sent else None
        self._sent.discard(number)
        fetched = time.monotonic()
        reply = await self._trainer.call(
            Apply(
                round=number,
                paths=[str(path) for path in paths],
                included=included,
                digest=self._cadence.checks(number),
            ),
            Applied,
        )
        self._journal.write(
            "applied",
            round=number,
            members=sorted(members),
            void=inclusion.void,
            included=included,
            wait_seconds=round(fetched - started, 4),
            seconds=round(time.monotonic() - fetched, 4),
            fingerprint=f"{reply.fingerprint:016x}",
            weights_sha256=reply.weights_sha256,
        )
        if included is False:
            log.warning("round %d: my update does not count; it went back into the momentum", number)
        self.wait_seconds += fetched - started
        if self._cadence.evaluates(number):
            await self.evaluate(number)
        await self._exchange.forget(max(0, number - KEPT_ROUNDS))

    async def _train(self, pulse: Pulse) -> None:
        number = pulse.run.round
        record = await self._record(number)
        if self._member not in record.slices:
            if not self._only_follows:
                self._only_follows = True
                log.warning(
                    "round %d has no data for this member: dropped, or out of sync; it only follows now", number
                )
            return
        positions = record.positions(self._member)
        started, started_at = time.monotonic(), time.time()
        blob_path = self._folder / f"update-{number}.part"
        request = Train(
            round=number,
            positions=positions,
            run=self._run_key.hex(),
            member=self._member,
            out_path=str(blob_path),
        )
        try:
            reply = await self._trainer.call(request, Trained)
        except RemoteFailure as error:
            # A failed step leaves the round, not the process: the others requeue this member's data.
            log.error("round %d: not trained: %s", number, error)
            self._journal.write("failed", round=number, reason=str(error))
            return
        seconds = time.monotonic() - started
        self.train_seconds += seconds
        length = blob_path.stat().st_size
        digest, adopted = await asyncio.to_thread(self._adopt, blob_path, number)
        self._sent.add(number)
        try:
            await self._chain.commit(number, digest, length, reply.tokens, reply.fingerprint_before)
        except ProgramError as error:
            log.warning("round %d: the commitment came too late or was refused: %s", number, error)
            self._journal.write("late", round=number, reason=str(error))
        else:
            await self._exchange.publish(number, self._member, digest, adopted)
        stats = await self._network.call(GetStats(), Stats)
        self._journal.write(
            "trained",
            round=number,
            loss=reply.loss,
            tokens=reply.tokens,
            started=round(started_at, 4),
            seconds=round(seconds, 4),
            update_bytes=length,
            bytes_sent=stats.bytes_sent,
            bytes_received=stats.bytes_received,
            fingerprint=f"{reply.fingerprint_before:016x}",
        )
        log.info(
            "round %d: loss %.4f over %d tokens in %.2f s, update %d bytes",
            number,
            reply.loss,
            reply.tokens,
            seconds,
            length,
        )

    def _adopt(self, path: Path, number: int) -> tuple[bytes, int]:
        """Move the update into the store; return its digest and length."""
        if self._faults.active:
            path.write_bytes(self._faults.committed(path.read_bytes()))
        return self._store.adopt(path, number)

    async def _record(self, number: int) -> Round:
        record = self._witness.rounds.get(number)
        if record is None or not record.closed:
            self._witness.rounds = {found.round: found for found in await self._chain.rounds()}
            record = self._witness.rounds.get(number)
        if record is None:
            raise Desynced(
                f"round {number} is no longer on chain: this node was away for too long. Start it again with the "
                "newest checkpoint"
            )
        return record

    async def _checkpoint(self, number: int) -> None:
        reply = await self._trainer.call(Root(), RootIs)
        try:
            await self._chain.checkpoint(number, bytes.fromhex(reply.model_root))
        except ProgramError as error:
            log.info("checkpoint of round %d: %s", number, error)
        self._checkpointed = number
        folder = self._folder / "checkpoint"
        await self._trainer.call(Save(folder=str(folder), round=number), Ok)
        self._journal.write("checkpoint", round=number, model_root=reply.model_root, folder=str(folder))

    async def evaluate(self, round_number: int) -> None:
        """Measure the held-out loss of the current weights and journal it."""
        reply = await self._trainer.call(Evaluate(), Evaluated)
        self._journal.write("evaluated", round=round_number, heldout_loss=reply.loss)
