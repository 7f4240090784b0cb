"""The training process: a loop that answers the supervisor's requests with one session."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from psyche_node.ipc import BlockingChannel, Message, Ok, serve
from psyche_node.training import messages as m
from psyche_node.training.errors import TrainingError
from psyche_node.training.reader import DataReader
from psyche_node.training.session import HELDOUT_SEQUENCES, Session

log = logging.getLogger(__name__)

OpenData = Callable[[Path, bytes | None, str], DataReader]
"""Opens a prepared folder, whose manifest must have the digest if one is given, and knows where the run's data is."""


class Trainer:
    """Answers requests. ``handle`` raises what goes wrong; the loop turns that into a Failure."""

    def __init__(self, open_data: OpenData, end: Callable[[], None]) -> None:
        self._open_data, self._end = open_data, end
        self._session: Session | None = None

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
        data = self._open_data(Path(request.data), expected, request.data_source)
        session = self._session = Session(
            Path(request.model), data, request.terms, request.device, request.micro_batch, request.threads
        )
        for reason in session.reasons:
            log.debug("%s", reason)
        return m.Loaded(
            shapes=session.shapes,
            layout_digest=session.optimizer.layout.digest.hex(),
            model_root=session.model_root().hex(),
            data_manifest=data.digest.hex(),
            samples=len(data),
            sequence_length=data.sequence_length,
            update_bytes=session.optimizer.layout.update_bytes,
            parameters=session.parameters,
            unigram_entropy=data.unigram_entropy,
            device=session.device.words,
            reasons=session.reasons,
        )

    def _with(self, session: Session, request: Message) -> Message:
        started = time.perf_counter()
        match request:
            case m.Train():
                return self._train(session, request)
            case m.Apply():
                blobs = [Path(path).read_bytes() for path in request.paths]
                session.apply(request.round, blobs, request.included)
                return m.Applied(
                    fingerprint=session.fingerprint(),
                    weights_sha256=session.weights_sha256() if request.digest else None,
                    seconds=time.perf_counter() - started,
                )
            case m.Evaluate():
                limit = HELDOUT_SEQUENCES if request.sequences is None else request.sequences
                loss, tokens = session.evaluate(limit)
                return m.Evaluated(loss=loss, tokens=tokens, seconds=time.perf_counter() - started)
            case m.Root():
                return m.RootIs(model_root=session.model_root().hex())
            case m.Weights():
                return m.WeightsAre(sha256=session.weights_sha256(), fingerprint=session.fingerprint())
            case m.Save():
                rounds = {} if request.round is None else {"rounds": str(request.round)}
                session.save(Path(request.folder), {**request.provenance, **rounds})
                return Ok()
        raise TrainingError(f"the training process knows no {type(request).__name__}")

    def _train(self, session: Session, request: m.Train) -> m.Trained:
        result = session.train(request.round, request.positions, run=bytes.fromhex(request.run), member=request.member)
        # Renamed into place, so that the supervisor never finds half an update.
        temporary = Path(f"{request.out_path}.writing")
        temporary.write_bytes(result.blob)
        os.replace(temporary, request.out_path)
        return m.Trained(
            loss=result.loss,
            tokens=result.tokens,
            seconds=result.seconds,
            fingerprint_before=result.fingerprint_before,
            gradient_norm=result.gradient_norm,
        )


def run_trainer(fd: int, open_data: OpenData) -> None:
    """Serve the supervisor at the other end of the socket ``fd`` until it closes it or asks to shut down."""
    channel = BlockingChannel(fd)

    def end() -> None:
        # Nothing more is read, so the loop ends after this reply, which still goes out.
        with socket.socket(fileno=os.dup(fd)) as same:
            same.shutdown(socket.SHUT_RD)

    trainer = Trainer(open_data, end)
    try:
        serve(channel, trainer.handle)
    finally:
        channel.close()
