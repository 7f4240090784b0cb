"""Tasks evaluated while the node has nothing else to do: in slices that end as soon as the round needs the model.

The training process does one thing at a time and looks, between batches and between generated tokens, whether another
request has come. So nothing is cancelled here: the round loop sends its request, and the slice under way comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from solders.signature import Signature

from coordinator.client import ChainError
from psyche_node.evaluation import Results
from psyche_node.ipc import Caller, IpcError, Ok, RemoteFailure
from psyche_node.node.journal import Journal
from psyche_node.training.messages import HoldWeights, OpenTasks, TasksWorked, WorkOnTasks

log = logging.getLogger(__name__)
SLICE_SECONDS = 5.0


class Notary(Protocol):
    """Where digests of results are recorded: the chain client."""

    async def record_evaluation(self, round: int, digest: bytes) -> Signature: ...


class IdleTasks:
    """The evaluations of one node; one at a time.

    Args:
        files: task files; empty: nothing is ever done here.
        folder: results are written to its subfolder ``evaluations``.
        tell: hears of every result, for the metrics.
    """

    def __init__(
        self,
        files: Sequence[Path],
        trainer: Caller,
        chain: Notary,
        journal: Journal,
        folder: Path,
        tell: Callable[[Results], None] = lambda results: None,
    ) -> None:
        self._files, self._trainer, self._chain, self._journal, self._tell = files, trainer, chain, journal, tell
        self._folder = folder / "evaluations"
        self._round: int | None = None
        self._newest = -1
        self._idle = False
        self._seconds = 0.0
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Have the training process read the task files. Raises RemoteFailure with what is wrong with one."""
        if self._files:
            await self._trainer.call(OpenTasks(files=[str(file) for file in self._files]), Ok)

    async def begin(self, round: int) -> None:
        """Evaluate the present weights, which contain ``round`` rounds, when there is time. One that is still under way
        goes on instead: under a small load of spare time some results are better than none."""
        if not self._files:
            return
        if self._round is not None:
            log.info("tasks: not evaluated after %d rounds; those after %d are still under way", round, self._round)
            return
        try:
            await self._trainer.call(HoldWeights(round=round), Ok)
        except RemoteFailure as error:
            log.warning("tasks: not evaluated after %d rounds: %s", round, error)
            return
        self._round = self._newest = round
        self._seconds = 0.0

    @contextlib.contextmanager
    def spare(self) -> Iterator[None]:
        """Within it the model is not needed."""
        self._idle = True
        self._start()
        try:
            yield
        finally:
            self._idle = False

    async def finish(self, round: int) -> None:
        """Do what is left of the evaluation under way, and then that of the last weights, after ``round`` rounds."""
        await self._complete()
        if self._newest != round:
            await self.begin(round)
            await self._complete()

    async def _complete(self) -> None:
        with self.spare():
            if self._worker is not None:
                await self._worker

    def _start(self) -> None:
        if self._round is not None and (self._worker is None or self._worker.done()):
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._idle and (round_number := self._round) is not None:
            try:
                reply = await self._trainer.call(WorkOnTasks(seconds=SLICE_SECONDS), TasksWorked)
            except RemoteFailure as error:
                self._round = None
                log.warning("tasks: the evaluation after %d rounds failed: %s", round_number, error)
                return
            except IpcError:
                return  # the process is gone, and the node ends with what it says
            self._seconds += reply.seconds
            if reply.results is not None:
                self._round = None
                await self._record(Results.model_validate_json(reply.results))

    async def _record(self, results: Results) -> None:
        """Keep the results, and put their digest on chain. A chain that is away costs the digest only, and a disk that
        is full the file, without which a digest would prove nothing."""
        number = results.round or 0
        file = self._folder / f"round-{number}.json"
        self._tell(results)
        try:
            self._folder.mkdir(exist_ok=True)
            await asyncio.to_thread(file.write_bytes, results.canonical() + b"\n")
        except OSError as error:
            log.warning("tasks: the results after %d rounds are not kept: %s; free space there", number, error)
            return
        signature = None
        try:
            signature = str(await self._chain.record_evaluation(number, results.digest))
        except ChainError as error:
            log.warning("tasks: the results after %d rounds are not on chain: %s", number, error)
        self._journal.write(
            "tasks",
            round=number,
            results=[one.model_dump(mode="json") for one in results.tasks],
            sha256=results.digest.hex(),
            signature=signature,
            file=str(file),
            seconds=round(self._seconds, 4),
        )
        for one in results.tasks:
            figures = ", ".join(f"{name} {measure.value:.4f}" for name, measure in one.measures.items())
            log.info("task %s after %d rounds: %s", one.task, number, figures)
