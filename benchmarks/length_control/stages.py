"""The two stages: their samples, their terms, and training by simulated members with the product's sessions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.length_control.answers import answers, think
from benchmarks.length_control.sums import LONGEST_PROMPT, Question, sample
from coordinator.values import float_bits
from psyche_node.data import PackedDataset
from psyche_node.evaluation import Subject
from psyche_node.sim.recipe import SimRecipe, recipe_for
from psyche_node.training import Session, TrainingTerms
from psyche_node.training.schedule import Schedule

MEMBERS = 2
LENGTH = 68
"""Tokens of a sequence, and of the model's context."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A shipped recipe, the rounds that it is compressed into, and its peak learning rate."""

    recipe: str
    rounds: int
    rate: float
    batch: int
    topk: int

    @property
    def settings(self) -> SimRecipe:
        """Schedule, decays and clipping are the recipe's, and the warm-up is as long a part of the run as there."""
        sizes = {"sequence_length": LENGTH, "batch": self.batch, "topk": self.topk}
        return recipe_for(self.recipe, self.rounds, peak_lr=self.rate, **sizes)


def training_terms(settings: SimRecipe, rounds: int) -> TrainingTerms:
    return TrainingTerms(
        total_rounds=rounds,
        schedule=Schedule[settings.schedule.upper()],
        warmup_rounds=settings.warmup_rounds,
        peak_lr_bits=float_bits(settings.peak_lr),
        final_lr_bits=float_bits(settings.final_lr),
        weight_decay_bits=float_bits(settings.weight_decay),
        clip_norm_bits=float_bits(settings.clip_norm),
        decay_bits=float_bits(settings.decay),
        topk=settings.topk,
        lookahead=settings.lookahead,
        clip_votes=settings.clip_votes,
        window=settings.window,
    )


def train(start: Path, data: Path, stage: Stage, out: Path, say: Callable[[str], None]) -> list[float]:
    """Train from the model in ``start``, save to ``out`` and return the loss of each round."""
    settings = stage.settings
    terms = training_terms(settings, stage.rounds)
    sessions = [Session(start, PackedDataset(data), terms, "cpu") for _ in range(MEMBERS)]
    share, losses = settings.batch // MEMBERS, []
    for number in range(stage.rounds):
        first = number * settings.batch
        results = [
            session.train(number, range(first + m * share, first + (m + 1) * share), run=bytes(32), member=m)
            for m, session in enumerate(sessions)
        ]
        for session in sessions:
            session.apply(number, [result.blob for result in results], True)
        losses.append(sum(result.loss for result in results) / MEMBERS)
        if number % 100 == 99 or number == stage.rounds - 1:
            say(f"{out.name}: {number + 1} rounds, loss {recent(losses):.3f}")
    if len({session.fingerprint() for session in sessions}) > 1:
        raise RuntimeError("the members' weights differ")
    sessions[0].save(out)
    return losses


def recent(losses: Sequence[float]) -> float:
    """The mean of the last rounds."""
    return fmean(losses[-20:])


def overlong_samples(model: Path, asked: Sequence[Question], budget: int, seed: int) -> list[dict[str, Any]]:
    """What a model says to questions until its context is full, where it is too long, and then its answer by force.

    As the report has it: of the present model, only what overran, and its own answer behind it, right or wrong. The
    reasoning is whole; `psyche-node data prepare --length-control` cuts it.
    """
    engine = Subject.load(model, "cpu", "float32", LENGTH).engine
    overlong = [one for one in think(engine, asked, LENGTH - LONGEST_PROMPT, seed) if len(one.reasoning) > budget]
    said = answers(engine, overlong, budget, seed + len(asked))
    return [sample(one.question, text, engine.decode(one.reasoning)) for one, text in zip(overlong, said, strict=True)]


def mixed(overlong: Sequence[dict[str, Any]], traces: Sequence[dict[str, Any]], rng: random.Random) -> list[object]:
    """Stage 2's samples: the overlong ones, and as many of stage 1's as they are, in a random order."""
    together = [*overlong, *rng.sample(list(traces), min(len(overlong), len(traces)))]
    rng.shuffle(together)
    return list(together)
