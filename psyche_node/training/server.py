"""The training process: a loop that answers the supervisor's requests with one session."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from psyche_node.ipc import BlockingChannel, Message, Ok, serve
from psyche_node.training import messages as m
from psyche_node.training.errors import TrainingError
from psyche_node.training.reader import DataReader
from psyche_node.training.session import HELDOUT_SEQUENCES, Session
from psyche_node.training.world import ONE_PROCESS, World

if TYPE_CHECKING:
    from psyche_node.training.control import Control

log = logging.getLogger(__name__)

OpenData = Callable[[Path, bytes | None, str], DataReader]
"""Opens a prepared folder, whose manifest must have the digest if one is given, and knows where the run's data is."""


class Tasks(Protocol):
    """Tasks that are evaluated between rounds (psyche_node.evaluation.between)."""

    def hold(self, round: int) -> None: ...

    def work(self, wanted: Callable[[], bool], seconds: float) -> str | None: ...


OpenTasks = Callable[[Session, Path, Sequence[Path]], Tasks]
"""Opens task files for a session, whose tokenizer is in a folder."""


class Trainer:
    """Answers requests. ``handle`` raises what goes wrong; the loop turns that into a Failure.

    ``wanted`` says whether another request is waiting.
    """

    def __init__(
        self,
        open_data: OpenData,
        open_tasks: OpenTasks,
        end: Callable[[], None],
        wanted: Callable[[], bool],
        world: World = ONE_PROCESS,
    ) -> None:
        self._open_data, self._open_tasks, self._end, self._wanted = open_data, open_tasks, end, wanted
        self._world = world
        self._session: Session | None = None
        self._model_dir = Path()
        self._tasks: Tasks | None = None

    def handle(self, request: Message) -> Message:
        """Return the reply to one request. Raises TrainingError for one that does not fit."""
        if isinstance(request, m.Shutdown):
            self._end()
            return Ok()
        if isinstance(request, m.Load):
            return self._load(request)
        if self._session is None:
            raise TrainingError(f"{type(request).__name__} came before Load; send Load first")
        return self._with(self._session, request)

    def _load(self, request: m.Load) -> m.Loaded:
        if self._session is not None:
            raise TrainingError("this process has loaded a model already; start another process for another model")
        expected = None if request.data_manifest is None else bytes.fromhex(request.data_manifest)
        data = self._world.together(lambda: self._open_data(Path(request.data), expected, request.data_source))
        session = self._session = Session(
            Path(request.model),
            data,
            request.terms,
            request.device,
            request.micro_batch,
            request.threads,
            self._world,
            request.tensor_parallel,
            request.options,
            None if request.layout_digest is None else bytes.fromhex(request.layout_digest),
            request.model_root,
        )
        self._model_dir = Path(request.model)
        for reason in session.reasons:
            log.debug("%s", reason)
        return m.Loaded(
            shapes=session.shapes,
            layout_digest=session.optimizer.layout.digest.hex(),
            precision=session.precision,
            model_root=session.model_root().hex(),
            data_manifest=data.digest.hex(),
            samples=len(data),
            sequence_length=data.sequence_length,
            update_bytes=session.optimizer.layout.update_bytes,
            parameters=session.parameters,
            unigram_entropy=data.unigram_entropy,
            device=session.device.words if self._world.size == 1 else f"{self._world.size} x {session.device.words}",
            reasons=session.reasons,
        )

    def _with(self, session: Session, request: Message) -> Message:
        started = time.perf_counter()
        match request:
            case m.Train():
                return self._train(session, request)
            case m.Apply():
                blobs = self._world.files([Path(path) for path in request.paths])
                session.apply(request.round, blobs, request.included)
                lost = session.optimizer.report().lost if blobs else None
                return m.Applied(
                    fingerprint=session.fingerprint(),
                    weights_sha256=session.weights_sha256() if request.digest else None,
                    seconds=time.perf_counter() - started,
                    updates_lost=lost,
                    rate=session.rate(request.round),
                )
            case m.Evaluate():
                limit = HELDOUT_SEQUENCES if request.sequences is None else request.sequences
                loss, tokens = session.evaluate(limit)
                return m.Evaluated(loss=loss, tokens=tokens, seconds=time.perf_counter() - started)
            case m.OpenTasks() | m.HoldWeights() | m.WorkOnTasks():
                return self._on_tasks(session, request, started)
            case m.Root():
                return m.RootIs(model_root=session.model_root().hex())
            case m.Weights():
                return m.WeightsAre(sha256=session.weights_sha256(), fingerprint=session.fingerprint())
            case m.Save():
                rounds = {} if request.round is None else {"rounds": str(request.round)}
                session.save(Path(request.folder), {**request.provenance, **rounds})
                return Ok()
        raise TrainingError(f"the training process knows no {type(request).__name__}")

    def _on_tasks(
        self, session: Session, request: m.OpenTasks | m.HoldWeights | m.WorkOnTasks, started: float
    ) -> Message:
        if self._world.size > 1:
            raise TrainingError(
                f"{self._world.size} ranks hold this model, and tasks need all of it in one process: leave `tasks` "
                "out, and evaluate the checkpoint with `psyche-node eval`"
            )
        if isinstance(request, m.OpenTasks):
            self._tasks = self._open_tasks(session, self._model_dir, [Path(file) for file in request.files])
            return Ok()
        if self._tasks is None:
            raise TrainingError(f"{type(request).__name__} came before OpenTasks; send OpenTasks first")
        if isinstance(request, m.HoldWeights):
            self._tasks.hold(request.round)
            return Ok()
        results = self._tasks.work(self._wanted, request.seconds)
        return m.TasksWorked(results=results, seconds=time.perf_counter() - started)

    def _train(self, session: Session, request: m.Train) -> m.Trained:
        result = session.train(request.round, request.positions, run=bytes.fromhex(request.run), member=request.member)
        try:
            self._world.together(lambda: self._write(result.blob, Path(request.out_path)))
        except Exception:
            # Nobody will get it, so lookahead must not count on it for good.
            session.take_back(request.round)
            raise
        return m.Trained(
            loss=result.loss,
            tokens=result.tokens,
            seconds=result.seconds,
            fingerprint_before=result.fingerprint_before,
            gradient_norm=result.gradient_norm,
        )

    def _write(self, blob: bytes, path: Path) -> None:
        """Write an update on rank 0's host: renamed into place, so that the supervisor never finds half of one."""
        if self._world.rank != 0:
            return
        temporary = Path(f"{path}.writing")
        try:
            temporary.write_bytes(blob)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def run_trainer(
    fd: int,
    open_data: OpenData,
    open_tasks: OpenTasks,
    world: World = ONE_PROCESS,
    control: Control | None = None,
) -> None:
    """Serve the supervisor at the other end of the socket ``fd`` until it closes it or asks to shut down.

    ``control`` leads to the other ranks of ``world``, where ``run_rank`` runs.
    """
    channel = BlockingChannel(fd)

    def end() -> None:
        # Nothing more is read, so the loop ends after this reply, which still goes out.
        with socket.socket(fileno=os.dup(fd)) as same:
            same.shutdown(socket.SHUT_RD)

    trainer = Trainer(open_data, open_tasks, end, channel.waiting, world)
    try:
        if control is None:
            serve(channel, trainer.handle)
        else:
            lead(channel, trainer.handle, control, end)
    finally:
        channel.close()


def run_rank(open_data: OpenData, open_tasks: OpenTasks, world: World, control: Control) -> None:
    """Do what rank 0 does, until it ends. Raises OutOfStep when this rank cannot go on with the others."""
    from psyche_node.training.control import follow

    follow(Trainer(open_data, open_tasks, lambda: None, lambda: False, world).handle, control)


def lead(
    channel: BlockingChannel, handle: Callable[[Message], Message], control: Control, end: Callable[[], None]
) -> None:
    from psyche_node.training.control import Lead

    everywhere = Lead(handle, control, end)
    try:
        serve(channel, everywhere)
    finally:
        everywhere.close()
