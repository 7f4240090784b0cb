"""One run of the convergence benchmark: AdamW, a simulated variant, or the library's optimizer, from first weights to
the held-out loss.

Legend: P members, N blocks, C = 4096 values of a block.
"""

import time
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import cache
from math import log2
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.laboratory import Network, Recipe
from benchmarks.laboratory_model import Scale, Subject, Text
from optimizer import DisTrO


@dataclass(frozen=True, slots=True)
class Trial:
    """What is trained how. Two equal trials give the same numbers on the same machine."""

    method: Literal["adamw", "laboratory", "library"]
    recipe: Recipe
    """Of AdamW only lr, beta1, beta2, weight_decay and overlap (one round of delay, with no lookahead) count."""
    scale: Scale = field(default_factory=Scale)
    rounds: int = 300
    sequences: int = 8
    """Per round, of all members together."""
    members: int = 4
    seed: int = 0
    warmup: int = 10
    final: float = 0.05
    """Last learning rate, as a fraction of the peak; linear in between."""
    after: int = 0
    """Start from the weights that AdamW has after so many rounds, on other data."""
    after_lr: float = 5e-3
    heldout: int = 64
    """Held-out sequences."""

    def rate(self, round: int) -> float:
        if round < self.warmup:
            return self.recipe.lr * (round + 1) / self.warmup
        done = (round - self.warmup) / max(1, self.rounds - self.warmup)
        return self.recipe.lr * (1 - (1 - self.final) * done)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished trial. `curve` is (round, held-out loss); `train` the mean loss of the last tenth of all rounds."""

    trial: Trial
    heldout: float
    train: float
    curve: list[tuple[int, float]]
    parameters: int
    bytes_per_round: int
    left_out: int
    """Honest members left out by a robust rule, summed over rounds."""
    seconds: float

    def record(self) -> dict[str, Any]:
        return asdict(self)


def run(trial: Trial, points: int = 4) -> Outcome:
    """Train and evaluate `points` times. Raises nothing of its own: a diverged run has a loss of nan or inf."""
    started = time.monotonic()
    text, subject = _text(trial.scale, trial.seed), Subject(trial.scale, trial.seed)
    if trial.after:
        _pretrain(trial, text, subject)
    held = text.heldout(trial.heldout)
    trainer = _trainer(trial, text, subject)
    losses, curve = [], []
    due = {round(trial.rounds * (point + 1) / points) for point in range(points)}
    for number in range(trial.rounds):
        losses.append(trainer.step(number, trial.rate(number)))
        if number + 1 in due:
            trainer.show()
            curve.append((number + 1, subject.evaluate(held)))
    tail = losses[-max(1, trial.rounds // 10) :]
    return Outcome(
        trial=trial,
        heldout=curve[-1][1],
        train=sum(tail) / len(tail),
        curve=curve,
        parameters=subject.parameters,
        bytes_per_round=trainer.bytes_per_round,
        left_out=trainer.left_out,
        seconds=round(time.monotonic() - started, 1),
    )


def _trainer(trial: Trial, text: Text, subject: Subject) -> "_AdamW | _Laboratory | _Library":
    if trial.method == "adamw":
        return _AdamW(trial, text, subject)
    return (_Library if trial.method == "library" else _Laboratory)(trial, text, subject)


@cache
def _text(scale: Scale, seed: int) -> Text:
    return Text(scale, seed)


def _pretrain(trial: Trial, text: Text, subject: Subject) -> None:
    recipe = Recipe(lr=trial.after_lr, beta2=0.95)
    before = Trial("adamw", recipe, trial.scale, trial.after, trial.sequences, trial.members, trial.seed)
    trainer = _AdamW(before, text, subject)
    for number in range(trial.after):
        trainer.step(number, before.rate(number))
    trainer.show()


class _AdamW:
    """AdamW on the batch of all members, with the updates one round late if the recipe says overlap."""

    left_out = 0

    def __init__(self, trial: Trial, text: Text, subject: Subject) -> None:
        self._trial, self._text, self._subject = trial, text, subject
        self._weights = subject.flat.clone()
        self._first, self._second = torch.zeros_like(subject.flat), torch.zeros_like(subject.flat)
        self._late: deque[Tensor] = deque()
        self.bytes_per_round = 4 * subject.parameters

    def step(self, number: int, lr: float) -> float:
        trial, recipe, subject = self._trial, self._trial.recipe, self._subject
        subject.flat.copy_(self._weights)
        loss = subject.backward(self._text.rows((trial.after + number) * trial.sequences, trial.sequences))
        gradient = subject.gradient
        self._first.mul_(recipe.beta1).add_(gradient, alpha=1 - recipe.beta1)
        self._second.mul_(recipe.beta2).addcmul_(gradient, gradient, value=1 - recipe.beta2)
        root = (self._second / (1 - recipe.beta2 ** (number + 1))).sqrt_().add_(1e-8)
        self._late.append(self._first / (1 - recipe.beta1 ** (number + 1)) / root * lr)
        while self._late and (len(self._late) > recipe.overlap or number + 1 == trial.rounds):
            self._weights.mul_(1 - lr * recipe.weight_decay).sub_(self._late.popleft())
        return loss

    def show(self) -> None:
        """Put the weights to be evaluated into the model."""
        self._subject.flat.copy_(self._weights)


class _Laboratory:
    """Members simulated by `laboratory.Network`."""

    def __init__(self, trial: Trial, text: Text, subject: Subject) -> None:
        self._trial, self._text, self._subject = trial, text, subject
        first_NC = subject.blocks(subject.flat)
        self._network = Network(trial.recipe, first_NC, subject.groups(), trial.members, trial.seed)
        self.bytes_per_round = trial.recipe.bytes_per_block() * len(first_NC)

    @property
    def left_out(self) -> int:
        return self._network.left_out

    def step(self, number: int, lr: float) -> float:
        trial, subject, total = self._trial, self._subject, 0.0
        share = trial.sequences // trial.members
        gradients = []
        for member in range(trial.members):
            subject.load(self._network.ahead(member, lr))
            first = (trial.after + number) * trial.sequences + member * share
            total += subject.backward(self._text.rows(first, share))
            gradients.append(subject.blocks(subject.gradient))
        self._network.round(torch.stack(gradients), lr, last=number + 1 == trial.rounds)
        return total / trial.members

    def show(self) -> None:
        self._subject.load(self._network.weights_NC)


class _Library:
    """Members that are `optimizer.DisTrO`; they share one copy of the weights, as replicas are equal."""

    left_out = 0

    def __init__(self, trial: Trial, text: Text, subject: Subject) -> None:
        self._trial, self._text, self._subject = trial, text, subject
        recipe = trial.recipe
        self._optimizers = [
            DisTrO(
                subject.model.named_parameters(),
                lr=recipe.lr,
                decay=recipe.decay,
                topk=recipe.topk,
                weight_decay=recipe.weight_decay,
                window=round(-log2(1 - recipe.smooth)),
                lookahead=recipe.lookahead != "none",
                clip_votes=recipe.combine == "clip",
                robust=recipe.robust == "agreement",
            )
            for _ in range(trial.members)
        ]
        self._travelling: deque[tuple[list[bytes], float]] = deque()
        self.bytes_per_round = self._optimizers[0].layout.update_bytes

    def step(self, number: int, lr: float) -> float:
        trial, subject, total = self._trial, self._subject, 0.0
        share = trial.sequences // trial.members
        blobs = []
        for member, optimizer in enumerate(self._optimizers):
            optimizer.set_lr(lr)
            first = (trial.after + number) * trial.sequences + member * share
            with optimizer.lookahead():
                total += subject.backward(self._text.rows(first, share))
            blobs.append(optimizer.encode(run=bytes(32), round=number, member=member))
        self._travelling.append((blobs, lr))
        while self._travelling and (len(self._travelling) > trial.recipe.overlap or number + 1 == trial.rounds):
            due, rate = self._travelling.popleft()
            self._apply(due, rate)
        return total / trial.members

    def _apply(self, blobs: list[bytes], lr: float) -> None:
        # All members hold views of the same weights: restore them before each but the last applies its own copy.
        before = self._subject.flat.clone()
        for optimizer in self._optimizers:
            self._subject.flat.copy_(before)
            optimizer.apply(blobs, lr=lr)

    def show(self) -> None:
        """The weights are in the model already."""
