"""A tiny model's config, terms, and random packed data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from psyche_node.training import Session, TrainingTerms
from psyche_node.training import messages as m
from psyche_node.training.schedule import fp32_bits
from psyche_node.training.server import Trainer
from psyche_node.training.world import ONE_PROCESS, World

torch.set_num_threads(1)

LENGTH, SEQUENCES, VOCABULARY = 32, 64, 300
WORDS = ["red", "green", "blue", "cyan", "black", "white", "grey", "pink", "gold", "lime"]
TINY = {
    "model_type": "seed_oss",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}


def bits(value: str) -> int:
    return fp32_bits(Fraction(value))


def terms(**changes: Any) -> TrainingTerms:
    values: dict[str, Any] = {
        "total_rounds": 30,
        "schedule": 2,
        "warmup_rounds": 2,
        "peak_lr_bits": bits("0.004"),
        "final_lr_bits": bits("0.0005"),
        "clip_norm_bits": bits("1"),
        "decay_bits": bits("0.9"),
        "topk": 64,
    }
    return TrainingTerms(**{**values, **changes})


@dataclass(frozen=True)
class Packed:
    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    places: npt.NDArray[np.int64]


class RandomData:
    """Documents of a language with two rules, so that there is something to learn: packed, three or so a sequence."""

    sequence_length, vocabulary, unigram_entropy = LENGTH, VOCABULARY, 5.0
    digest = hashlib.sha256(b"random data").digest()

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        shape = (SEQUENCES, LENGTH)
        self._tokens = np.zeros(shape, np.int64)
        self._trained = np.zeros(shape, np.bool_)
        self._places = np.zeros(shape, np.int64)
        for row in range(SEQUENCES):
            at = 0
            while at < LENGTH:
                size = min(int(rng.integers(4, 18)), LENGTH - at)
                start, step = int(rng.integers(VOCABULARY)), int(rng.integers(1, 3))
                self._tokens[row, at : at + size] = (start + step * np.arange(size)) % VOCABULARY
                self._places[row, at : at + size] = np.arange(size)
                self._trained[row, at + min(2, size) : at + size] = True
                at += size

    def __len__(self) -> int:
        return SEQUENCES - 8

    def batch(self, positions: Sequence[int], seed: bytes) -> Packed:
        rows = [position % len(self) for position in positions]
        return Packed(self._tokens[rows], self._trained[rows], self._places[rows])

    def heldout(self, limit: int | None = None) -> Packed:
        rows = slice(len(self), len(self) + 8 if limit is None else len(self) + limit)
        return Packed(self._tokens[rows], self._trained[rows], self._places[rows])


def serving(model_dir: Path, data: RandomData, world: World = ONE_PROCESS, **changes: Any) -> tuple[Trainer, Session]:
    """The handler of requests that has loaded a model, and the session that it has."""
    trainer = Trainer(lambda *_: data, lambda *_: pytest.fail("no tasks"), lambda: None, lambda: False, world)
    trainer.handle(
        m.Load(model=str(model_dir), data="", terms=terms(), device="cpu", micro_batch=2, threads=1, **changes)
    )
    assert trainer._session is not None
    return trainer, trainer._session
