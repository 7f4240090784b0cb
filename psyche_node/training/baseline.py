"""The baseline: AdamW with dense gradients, one process, same initial model, same tokens in the same rounds.

What the distributed run is to be compared with. Its learning rate is its own: short runs over a grid decide, each with
the whole schedule compressed into a fraction of the rounds; while the best is at an edge of the grid, the grid grows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from psyche_node.training.errors import TrainingError
from psyche_node.training.gradient import accumulate
from psyche_node.training.preparing import Trainable, prepare_model
from psyche_node.training.reader import DataReader
from psyche_node.training.session import (
    HELDOUT_SEQUENCES,
    heldout_loss,
)
from psyche_node.training.terms import TrainingTerms, fp32
from psyche_node.training.world import ONE_PROCESS

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
"""The grid that the search starts from. It suits a million parameters; larger models want less, and the grid grows."""
_GRID_FACTOR = 2.0
_GRID_LIMIT = 8
_SEARCH_SHARE = 0.15
_SEARCH_ROUNDS = 12
_WARMUP_SHARE = 0.08
_FINAL_SHARE = 0.1
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """What AdamW reached.

    ``loss[r]`` is the mean training loss of round r, ``heldout_curve`` the held-out loss after so many rounds (0: the
    untrained model), in nats. ``tried`` maps each learning rate of the search to the held-out loss of its short run.
    ``wall_seconds`` leaves the search out.
    """

    loss: list[float]
    heldout_curve: list[tuple[int, float]]
    heldout_loss: float
    learning_rate: float
    tried: dict[float, float]
    wall_seconds: float


def run_adamw(
    model_dir: Path,
    data: DataReader,
    terms: TrainingTerms,
    rounds: Sequence[Sequence[int]],
    *,
    learning_rate: float | None = None,
    evaluate_every: int = 10,
    sequences: int | None = HELDOUT_SEQUENCES,
    device: str = "auto",
    micro_batch: int = 0,
    threads: int = 0,
    progress: Progress = lambda line: None,
) -> BaselineRun:
    """Train ``rounds`` (the positions of each, all members' together) with AdamW.

    ``learning_rate`` is the peak; None searches for it. ``terms`` gives the clipping norm, the z-loss and the order of
    the data, so that position p is the same sequence as in the distributed run. Rounds without a trained token are
    passed over.

    Raises:
        TrainingError: there are no rounds, or training diverged at every learning rate tried.
    """
    if not rounds:
        raise TrainingError("there is no round to train. Pass the positions of at least one")
    ready = prepare_model(model_dir, data, device, micro_batch, threads, fp32(terms.z_loss_bits))
    run = _Run(ready, data, terms, sequences)
    tried: dict[float, float] = {}
    if learning_rate is None:
        short = rounds[: min(len(rounds), max(_SEARCH_ROUNDS, round(len(rounds) * _SEARCH_SHARE)))]
        learning_rate = _search(lambda rate: run.train(short, rate, 0)[1][-1][1], tried, progress)
    started = time.perf_counter()
    loss, curve = run.train(rounds, learning_rate, evaluate_every, progress)
    return BaselineRun(loss, curve, curve[-1][1], learning_rate, tried, time.perf_counter() - started)


def _search(heldout_after: Callable[[float], float], tried: dict[float, float], progress: Progress) -> float:
    """Return the learning rate with the lowest held-out loss; fill ``tried``."""
    waiting = list(LEARNING_RATES)
    while True:
        for rate in waiting:
            tried[rate] = heldout_after(rate)
            progress(f"adamw: learning rate {rate:g}: held-out loss {tried[rate]:.4f} after a short run")
        finite = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
        best = min(finite, key=lambda rate: finite[rate]) if finite else min(tried)
        beyond = (best / _GRID_FACTOR) if best == min(tried) else (best * _GRID_FACTOR) if best == max(tried) else None
        if beyond is None or len(tried) >= _GRID_LIMIT:
            if not finite:
                raise TrainingError(f"AdamW diverged at every learning rate from {min(tried):g} to {max(tried):g}")
            return best
        waiting = [beyond]


class _Run:
    """One model that is put back to its initial weights for each run."""

    def __init__(self, ready: Trainable, data: DataReader, terms: TrainingTerms, sequences: int | None) -> None:
        self._model, self._loss, self._device = ready.model, ready.loss, ready.device
        self._data, self._clip = data, fp32(terms.clip_norm_bits)
        self._seed = bytes.fromhex(terms.data_seed) or data.digest
        self._initial = copy.deepcopy(self._model.state_dict())
        self._heldout = data.heldout(sequences)

    def train(
        self,
        rounds: Sequence[Sequence[int]],
        rate: float,
        evaluate_every: int,
        progress: Progress = lambda line: None,
    ) -> tuple[list[float], list[tuple[int, float]]]:
        """Return the training loss per round and the held-out curve, which ends with the last round."""
        self._model.load_state_dict(self._initial)
        # Decay only matrices: norms and biases have no scale to lose.
        matrices = [p for p in self._model.parameters() if p.ndim >= 2]
        vectors = [p for p in self._model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS, eps=EPSILON, fused=True)
        losses: list[float] = []
        curve = [(0, self._evaluate())] if evaluate_every else []
        for number, positions in enumerate(rounds):
            for group in optimizer.param_groups:
                group["lr"] = rate * _shape(number, len(rounds))
            optimizer.zero_grad(set_to_none=True)
            batch = self._data.batch(positions, self._seed)
            if batch.trained.any():
                losses.append(accumulate(self._loss, batch, self._device))
                ONE_PROCESS.clip(self._model, self._clip)
                optimizer.step()
            else:
                losses.append(losses[-1] if losses else 0.0)
            done = number + 1
            if done == len(rounds) or (evaluate_every and done % evaluate_every == 0):
                curve.append((done, self._evaluate()))
                progress(f"adamw: round {done} of {len(rounds)}: loss {losses[-1]:.4f}, held out {curve[-1][1]:.4f}")
        return losses, curve

    def _evaluate(self) -> float:
        return heldout_loss(self._loss, self._heldout, self._device)[0]


def _shape(number: int, rounds: int) -> float:
    """The schedule: a short warm-up, then half a cosine to a tenth."""
    warmup = max(1, round(rounds * _WARMUP_SHARE))
    if number < warmup:
        return (number + 1) / warmup
    done = (number - warmup) / max(1, rounds - 1 - warmup)
    return _FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * done)) / 2
