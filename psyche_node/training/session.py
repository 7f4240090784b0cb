"""One model, its optimizer and its data on one device: positions in, updates out; updates in, new weights.

Legend: B sequences of a micro-batch, L places.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from optimizer import DisTrO
from optimizer.codec import Header
from optimizer.errors import UnknownRound
from psyche_node.training.checkpoint import save_checkpoint
from psyche_node.training.device import Device
from psyche_node.training.forward import LossFunction
from psyche_node.training.gradient import accumulate, micro_batches
from psyche_node.training.hashing import model_root, weights_sha256
from psyche_node.training.model import parameter_count
from psyche_node.training.options import DEFAULTS, Options, Precision
from psyche_node.training.preparing import Shapes, check_tensors, prepare_model, runs_in_bf16
from psyche_node.training.reader import DataReader, PackedBatch
from psyche_node.training.schedule import lr_bits
from psyche_node.training.terms import TrainingTerms, fp32
from psyche_node.training.world import ONE_PROCESS, World

HELDOUT_SEQUENCES = 64
"""Held-out sequences of an evaluation, unless asked otherwise."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """One member's share of a round. ``loss`` is the mean over the ``tokens`` trained tokens, in nats."""

    blob: bytes
    loss: float
    tokens: int
    seconds: float
    fingerprint_before: int
    gradient_norm: float


class Session:
    """Everything that a training process holds.

    Args:
        model_dir: Hugging Face folder of the initial weights, with the tokenizer.
        data: the prepared data; see ``DataReader``.
        terms: the run's terms.
        device: "auto", "cpu" or "cuda:0".
        micro_batch: sequences per forward pass; 0 chooses. The gradient is the mean over all trained tokens of the
            member's share, whatever this is.
        threads: CPU threads; 0 lets PyTorch choose.
        world: the processes that hold this replica together. Each has a session, and calls its methods with the same
            arguments in the same order.
        tensor_parallel: how many of them divide the matrices.
        options: how the model is run.
        layout_digest: of the run, which says what precision the weights are kept in; None: fp32, unless asked.
        run_root: the run's model root, in hexadecimal; with it, a model of other tensors than the run's is refused
            before its weights are read.

    Raises: see ``prepare_model``.
    """

    def __init__(
        self,
        model_dir: Path,
        data: DataReader,
        terms: TrainingTerms,
        device: str = "auto",
        micro_batch: int = 0,
        threads: int = 0,
        world: World = ONE_PROCESS,
        tensor_parallel: int = 1,
        options: Options = DEFAULTS,
        layout_digest: bytes | None = None,
        run_root: str | None = None,
    ) -> None:
        def in_bf16(shapes: Shapes) -> bool:
            if run_root is not None and layout_digest is not None:
                check_tensors(model_dir, shapes, terms.topk, layout_digest, run_root)
            return runs_in_bf16(options.precision, shapes, terms.topk, layout_digest)

        z_loss = fp32(terms.z_loss_bits)
        ready = prepare_model(
            model_dir,
            data,
            device,
            micro_batch,
            threads,
            z_loss,
            world,
            tensor_parallel,
            options,
            in_bf16,
            terms.lookahead,
        )
        self._world = world
        self.model, self.device, self._loss, self.reasons = ready.model, ready.device, ready.loss, ready.reasons
        self.terms, self._data, self._model_dir = terms, data, model_dir
        self._seed = bytes.fromhex(terms.data_seed) or data.digest
        self.optimizer = DisTrO(
            self.model.named_parameters(),
            lr=lr_bits(terms, terms.first_round),
            decay=fp32(terms.decay_bits),
            topk=terms.topk,
            weight_decay=fp32(terms.weight_decay_bits),
            lookahead=terms.lookahead,
            clip_votes=terms.clip_votes,
            window=terms.window,
            stochastic_rounding=ready.only_bf16,
        )
        self.precision: Precision = "bf16" if ready.only_bf16 else "fp32"
        self._heldout: dict[int | None, PackedBatch] = {}
        self._updates: dict[int, Header] = {}  # own ones that were neither included nor left out yet

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the trained tensors, in the layout's order."""
        return self.optimizer.shapes

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    def model_root(self) -> bytes:
        """The 32-byte root of the current weights."""
        return model_root(self.model, self._world)

    def weights_sha256(self) -> str:
        """The SHA-256 of the current weights, in hexadecimal."""
        return weights_sha256(self.model, self._world)

    def fingerprint(self) -> int:
        """The 64-bit fingerprint of the current weights."""
        return self.optimizer.fingerprint()

    def train(self, round: int, positions: Sequence[int], *, run: bytes, member: int) -> TrainResult:
        """Train the sequences at ``positions`` and make this member's update of ``round``; weights do not change.

        Without any trained token, the update is what momentum still holds. Raises what ``DisTrO.encode`` raises, such
        as NonFiniteGradient, and OutOfMemory; then this member leaves the round out, and nothing has changed.
        """
        started = time.perf_counter()
        before = self.fingerprint()
        self.optimizer.set_lr(lr_bits(self.terms, round))
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._world.together(lambda: self._data.batch(positions, self._seed))
        tokens = int(batch.trained.sum())
        loss = norm = 0.0
        if tokens:
            with self.optimizer.lookahead():
                loss = accumulate(self._loss, batch, self.device, self._world)
                self._world.complete(self.model)
                norm = self._world.clip(self.model, fp32(self.terms.clip_norm_bits))
        blob = self.optimizer.encode(run=run, round=round, member=member)
        # Not its bytes, which may be gigabytes on every rank.
        self._updates[round] = Header(run, round, member)
        return TrainResult(blob, loss, tokens, time.perf_counter() - started, before, norm)

    def rate(self, round: int) -> float:
        """Return the learning rate of a round as a share of the peak."""
        return fp32(lr_bits(self.terms, round)) / fp32(self.terms.peak_lr_bits)

    def apply(self, round: int, blobs: Sequence[bytes | memoryview], included: bool | None) -> None:
        """Step by the updates of ``round`` that count; no blob is a void round, which changes nothing.

        ``included`` says whether the own update of the round is among them (then it leaves the momentum for good) or
        not (then it goes back into it); None: there was none. Raises MalformedUpdate, or UnknownRound if no own update
        of the round is kept, with nothing changed.
        """
        if included is not None:
            self._kept(round)
        self.optimizer.apply(blobs, lr=lr_bits(self.terms, round))
        if included:
            del self._updates[round]
        elif included is not None:
            self.take_back(round)

    def take_back(self, round: int) -> None:
        """The own update of ``round`` counts nowhere: put it back into the momentum. Raises UnknownRound."""
        self.optimizer.restore(self._kept(round))
        del self._updates[round]

    def _kept(self, round: int) -> Header:
        if round not in self._updates:
            raise UnknownRound(f"no own update of round {round} is kept; its fate is decided once")
        return self._updates[round]

    def evaluate(self, sequences: int | None = HELDOUT_SEQUENCES) -> tuple[float, int]:
        """Return the mean loss in nats over the trained tokens of held-out sequences, and how many tokens these are.

        At most ``sequences`` of them, the same ones every time; None takes all. (0, 0) if none is held out.
        """
        if sequences not in self._heldout:
            self._heldout[sequences] = self._world.together(lambda: self._data.heldout(sequences))
        with self._world.attempt():
            return heldout_loss(self._loss, self._heldout[sequences], self.device, self._world)

    def save(self, folder: Path, provenance: dict[str, str] | None = None) -> None:
        """Write the current weights as a Hugging Face folder. Raises OSError."""
        rows = {
            **(provenance or {}),
            "model root (BLAKE3)": self.model_root().hex(),
            "weights SHA-256": self.weights_sha256(),
            "data manifest (SHA-256)": self._data.digest.hex(),
            "parameters": f"{self.parameters:,}",
            "optimizer": f"DisTrO, topk {self.terms.topk}, peak learning rate {fp32(self.terms.peak_lr_bits):g}",
        }
        save_checkpoint(self.model, self._model_dir, folder, rows, self._world)


@torch.no_grad()
def heldout_loss(
    loss: LossFunction, batch: PackedBatch, device: Device, world: World = ONE_PROCESS
) -> tuple[float, int]:
    """Return the mean loss over the trained tokens of ``batch`` and their number; (0, 0) if there is none."""
    tokens = int(batch.trained.sum())
    total = 0.0
    for part in micro_batches(batch, device, world):
        with device.compute():
            total += float(loss(*part))
    return (world.sum(total) / tokens if tokens else 0.0), tokens
