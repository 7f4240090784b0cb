"""The round loop: the one place where chain, network, data and training meet.

    assignment -> batch -> train -> blob -> commit -> announce        (this member's update, going out)
    inclusion set -> blobs -> apply                                   (everybody's updates, coming in)

One direction, one round after the other. The witness duty and the ticks run beside it as tasks of their own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.client import ChainError, CoordinatorClient, ProgramError, Pulse
from coordinator.errors import ErrorCode
from coordinator.state import InclusionSet, Phase, Run
from psyche_node.faults import Faults
from psyche_node.ipc import Caller, Ok, RemoteFailure
from psyche_node.network.messages import GetStats, Stats
from psyche_node.network.store import BlobStore
from psyche_node.node.committing import Committing
from psyche_node.node.exchange import UpdateExchange
from psyche_node.node.folder import CHECKPOINT
from psyche_node.node.idle import IdleTasks
from psyche_node.node.journal import Journal
from psyche_node.node.share import Share
from psyche_node.node.standing import LATER
from psyche_node.node.view import ChainView
from psyche_node.node.witness import Witness
from psyche_node.training.messages import Applied, Apply, Evaluate, Evaluated, Root, RootIs, Save, Train, Trained

log = logging.getLogger(__name__)
KEPT_ROUNDS = 4
_CLOSED = (ErrorCode.WRONG_ROUND, ErrorCode.WRONG_PHASE, ErrorCode.RUN_FINISHED)


class TermsChanged(Exception):
    """The run goes on with another model, other data or other optimizer settings than this node has loaded."""

    @staticmethod
    def between(loaded: Run, now: Run) -> bool:
        return _trains_by(loaded) != _trains_by(now)

    def __init__(self, now: Run) -> None:
        super().__init__(
            f"from round {now.model_round} on the run has another model, data or optimizer settings: get what the run "
            "now names (psyche-admin run show) and start this node again"
        )


def _trains_by(run: Run) -> tuple[object, ...]:
    return run.terms, run.model_round, run.schedule_rounds


# Below this share of the peak learning rate, as a schedule that ends at 0 comes to, lost steps are no news.
LEAST_RATE = 0.05


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
        trainer: Caller,
        network: Caller,
        store: BlobStore,
        journal: Journal,
        faults: Faults,
        share: Share,
        cadence: Cadence,
        tasks: IdleTasks,
        run_key: bytes,
        member: int,
        left_out: Callable[[], None],
        loaded: Run,
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
        self._share, self._cadence, self._run_key, self._member = share, cadence, run_key, member
        self._committing = Committing(chain, view, witness, member)
        self._left_out = left_out
        self._folder, self._update_timeout, self._tasks = folder, update_timeout, tasks
        self._loaded, self._applied = loaded, loaded.model_round
        self._trained = -1
        self._only_follows = False
        self._sent: dict[int, bool] = {}  # rounds trained and not yet applied: whether the update is committed
        self._checkpointed = -1
        self._ready_epoch = 0
        self.train_seconds = 0.0
        self.wait_seconds = 0.0

    @property
    def applied(self) -> int:
        """Rounds whose result is in the weights."""
        return self._applied

    async def root(self) -> bytes:
        """Return the model root of the weights."""
        return bytes.fromhex((await self._trainer.call(Root(), RootIs)).model_root)

    async def run(self) -> None:
        """Return when the run is finished and everything final has been applied.

        Raises Desynced, UpdateMissing, or what chain and processes raise when they are gone for good.
        """
        self._ready_epoch = self._view.pulse.run.epoch
        waiting_since = time.monotonic()
        while True:
            # One thing at a time, and then a look at the newest state: the run may have gone on meanwhile.
            with self._tasks.spare():
                run = (await self._view.until(self._has_work)).run
            if self._trained >= 0:
                self.wait_seconds += time.monotonic() - waiting_since
            if run.final_rounds > self._applied:
                await self._apply(self._next_inclusion(run))
                self._applied += 1
            elif TermsChanged.between(self._loaded, run):
                raise TermsChanged(run)
            elif run.phase is Phase.ROUND_TRAIN:
                self._trained = run.round
                await self._train(run.round)
            elif run.phase is Phase.WARMUP:
                self._ready_epoch = run.epoch
                await self._report_ready()
            else:
                await self._checkpoint(run)
                self._checkpointed = run.round
                if run.phase is Phase.FINISHED:
                    return
            waiting_since = time.monotonic()

    def _has_work(self, pulse: Pulse) -> bool:
        run = pulse.run
        return (
            run.phase is Phase.FINISHED
            or run.final_rounds > self._applied
            or TermsChanged.between(self._loaded, run)
            or (run.phase is Phase.ROUND_TRAIN and run.round > self._trained)
            or (run.phase is Phase.COOLDOWN and run.round > self._checkpointed)
            or (run.phase is Phase.WARMUP and run.epoch > self._ready_epoch)
        )

    def _next_inclusion(self, run: Run) -> InclusionSet:
        inclusion = run.inclusion_set(self._applied)
        if inclusion is None:
            raise _away(self._applied, run.round)
        return inclusion

    async def _apply(self, inclusion: InclusionSet) -> None:
        number = inclusion.round
        members = frozenset() if inclusion.void else inclusion.members
        started = time.monotonic()
        if not members <= self._exchange.followed(number):
            record = await self._witness.record(number, closed=True)
            if record is None:
                raise _away(number, self._view.pulse.run.round)
            await self._exchange.follow(number, record.commitments.values())
        with self._tasks.spare():
            paths = await self._exchange.obtain(number, members, self._update_timeout)
        included = self._member in members if number in self._sent else None
        committed = self._sent.pop(number, False)
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
            updates_lost=reply.updates_lost,
        )
        if reply.updates_lost and reply.rate >= LEAST_RATE:
            log.warning(
                "round %d: of %.2g%% of the weights the step is lost to rounding: the learning rate is too small for "
                "them, or the model diverges",
                number,
                100 * reply.updates_lost,
            )
        if committed and not included:
            why = "in a void round nobody's does" if inclusion.void else "too few witnesses attested to it"
            log.warning("round %d: this node's update does not count (%s); it goes into the next one", number, why)
        self.wait_seconds += fetched - started
        if self._cadence.evaluates(number):
            await self.evaluate(number)
            await self._tasks.begin(number + 1)
        await self._exchange.forget(max(0, number - KEPT_ROUNDS))

    async def _train(self, number: int) -> None:
        """Train this member's share of the round, commit to the update, announce it."""
        positions = await self._positions(number)
        if not positions:
            return
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
            self._share.missed()
            return
        seconds = time.monotonic() - started
        self.train_seconds += seconds
        length = blob_path.stat().st_size
        await self._hand_in(number, blob_path, length, reply, seconds)
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

    async def _positions(self, number: int) -> list[int]:
        """The sequences of a round that this member trains on; none if it takes no part, which is said."""
        record = await self._witness.record(number, closed=False)
        if record is None:
            log.warning("round %d was over before this node came to it", number)
            return []
        if self._member not in record.active:
            self._stand_by(number)
            return []
        if self._only_follows:
            self._only_follows = False
            log.info("round %d: this member takes part again", number)
        positions = record.positions(self._member)
        if not positions:
            log.info("round %d has no data for this member", number)
        return positions

    async def _hand_in(self, number: int, blob_path: Path, length: int, reply: Trained, seconds: float) -> None:
        """Commit to an update whose training took so long, and announce it; one that comes too late is kept."""
        digest, adopted = await asyncio.to_thread(self._adopt, blob_path, number)
        self._sent[number] = False
        try:
            await self._committing.commit(number, digest, length, reply)
            self._sent[number] = True
        except ChainError as error:
            late = isinstance(error, ProgramError) and error.code in _CLOSED
            why = "the round had closed before, since the others were faster" if late else str(error)
            log.warning(
                "round %d: trained for %.2f s, but not committed: %s. The update goes into the next one",
                number,
                seconds,
                why,
            )
            self._journal.write("late", round=number, reason=str(error))
            self._share.missed()
        else:
            await self._exchange.publish(number, self._member, digest, adopted)
            await self._share.follow(reply.tokens, seconds, self._view.pulse.run.limits.max_share)

    def _stand_by(self, number: int) -> None:
        """A member that is not active only follows, until it is again: it has joined or was dropped."""
        self._left_out()
        self._share.missed()
        if not self._only_follows:
            self._only_follows = True
            log.warning("round %d is trained without this member: it only follows", number)

    def _adopt(self, path: Path, number: int) -> tuple[bytes, int]:
        """Move the update into the store; return its digest and length."""
        if self._faults.active:
            path.write_bytes(self._faults.committed(path.read_bytes()))
        return self._store.adopt(path, number)

    async def _report_ready(self) -> None:
        """The run waited for members and now warms up again: this node has the checkpoint's weights."""
        root = await self.root()
        try:
            await self._chain.ready(root)
        except ProgramError as error:
            if error.code != ErrorCode.ALREADY_READY:  # one that has joined again may be
                log.warning("not ready for the next epoch, this node only follows: %s", error)
        except ChainError as error:
            log.warning("not ready for the next epoch, this node only follows: %s", error)

    async def _checkpoint(self, run: Run) -> None:
        """Vote for the root of these weights, if the run asks for it, and keep them; once per cooldown."""
        if run.round <= self._checkpointed:
            return
        root = await self.root()
        if run.phase is Phase.COOLDOWN:
            try:
                await self._chain.checkpoint(run.round, root)
            except ProgramError as error:
                log.info("checkpoint of round %d: %s", run.round, error)
            except ChainError as error:
                log.warning("checkpoint of round %d not reported, the others may do: %s", run.round, error)
        folder = self._folder / CHECKPOINT
        try:
            await self._trainer.call(Save(folder=str(folder), round=run.round), Ok)
        except RemoteFailure as error:
            log.error("checkpoint of round %d not saved: %s", run.round, error)
            return
        self._journal.write("checkpoint", round=run.round, model_root=root.hex(), folder=str(folder))

    async def evaluate(self, round_number: int) -> float | None:
        """Measure the held-out loss of the current weights, journal it and return it; None: nothing is held out."""
        started = time.monotonic()
        reply = await self._trainer.call(Evaluate(), Evaluated)
        seconds = round(time.monotonic() - started, 4)
        loss = reply.loss if reply.tokens else None
        self._journal.write("evaluated", round=round_number, heldout_loss=loss, seconds=seconds)
        return loss


def _away(round_number: int, now: int) -> Desynced:
    return Desynced(
        f"round {round_number} is no longer kept on chain (the run is in round {now}): this node was away for too "
        f"long; {LATER}"
    )
