"""Tasks between a session's rounds: the weights that were held are measured, and those in training do not notice."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from psyche_node.evaluation import Results, Subject, TaskError, open_tasks, run_suite
from psyche_node.evaluation.between import TasksBetween
from psyche_node.evaluation.steps import finish
from psyche_node.training import Session, TrainingTerms
from psyche_node.training.schedule import fp32_bits

ROWS = [{"q": f"what is {a} plus {a}", "sum": 2 * a, "options": [str(a), str(2 * a)]} for a in range(2, 14)]


@dataclass(frozen=True)
class Packed:
    tokens: npt.NDArray[np.int64]
    trained: npt.NDArray[np.bool_]
    places: npt.NDArray[np.int64]


class Data:
    """Sequences of noise: all that matters is that training on them moves the weights."""

    sequence_length, vocabulary, unigram_entropy = 16, 200, 5.0
    digest = hashlib.sha256(b"noise").digest()

    def __len__(self) -> int:
        return 64

    def batch(self, positions: Sequence[int], seed: bytes) -> Packed:
        shape = (len(positions), self.sequence_length)
        tokens = np.random.default_rng(sum(positions)).integers(0, self.vocabulary, shape)
        return Packed(tokens, np.ones(shape, np.bool_), np.broadcast_to(np.arange(shape[1]), shape).copy())

    def heldout(self, limit: int | None = None) -> Packed:
        return self.batch(range(limit or 4), b"")


@pytest.fixture
def session(folder: Path) -> Session:
    rate = fp32_bits(Fraction("0.01"))
    return Session(folder, Data(), TrainingTerms(total_rounds=9, peak_lr_bits=rate, final_lr_bits=rate), "cpu")


@pytest.fixture
def files(write_task: Callable[..., Path]) -> list[Path]:
    choice: dict[str, Any] = {"kind": "multiple_choice", "choices": "options"}
    common = {"prompt": "{{ q }}?", "target": "{{ sum }}"}
    return [
        write_task(ROWS, name="choice", **choice, **common),
        write_task(ROWS, name="said", kind="generate_until", max_new_tokens=12, **common),
    ]


def train(session: Session, number: int) -> None:
    result = session.train(number, [number], run=bytes(32), member=0)
    session.apply(number, [result.blob], True)


def measured(folder: Path, files: Sequence[Path]) -> list[Any]:
    return finish(run_suite(Subject.load(folder, "cpu", "float32", 16), open_tasks(files))).tasks


def test_held_weights_are_measured_while_training_goes_on(
    session: Session, folder: Path, files: list[Path], tmp_path: Path
) -> None:
    tasks = TasksBetween(session, folder, files)
    assert tasks.work(lambda: False, 60.0) is None  # nothing is held yet
    train(session, 0)
    session.save(tmp_path / "held")
    held = session.fingerprint()
    tasks.hold(1)
    results = None
    for number in itertools.count(1):
        before = session.weights_sha256()
        looks = itertools.count()
        # Each slice ends at its fourth look: in the middle of answers, too.
        results = tasks.work(lambda looks=looks: next(looks) >= 4, 60.0)  # type: ignore[misc]
        assert session.weights_sha256() == before
        assert session.model.training
        if results is not None:
            break
        if number < 9:
            train(session, number)
    assert number > 3
    assert session.fingerprint() != held
    found = Results.model_validate_json(results)
    assert found.canonical().decode() == results
    assert (found.round, found.fingerprint, found.model_root) == (1, f"{held:016x}", None)
    assert found.tasks == measured(tmp_path / "held", files)
    assert tasks.work(lambda: False, 60.0) is None  # they are told once


def test_a_slice_does_nothing_when_it_is_not_wanted(session: Session, folder: Path, files: list[Path]) -> None:
    tasks = TasksBetween(session, folder, files)
    tasks.hold(0)
    assert tasks.work(lambda: True, 60.0) is None
    assert tasks.work(lambda: False, 0.0) is None
    assert tasks.work(lambda: False, 60.0) is not None


def test_replicas_stay_equal_beside_one_that_evaluates(folder: Path, files: list[Path], session: Session) -> None:
    other = Session(folder, Data(), session.terms, "cpu")
    tasks = TasksBetween(session, folder, files)
    tasks.hold(0)
    for number in range(3):
        train(session, number)
        looks = iter([False, False, True])
        tasks.work(lambda looks=looks: next(looks, True), 60.0)  # type: ignore[misc]
        train(other, number)
    assert session.weights_sha256() == other.weights_sha256()


def test_tasks_that_cannot_be_interrupted_are_refused(
    session: Session, folder: Path, write_task: Callable[..., Path]
) -> None:
    file = write_task(ROWS, kind="generate_until", prompt="{{ q }}", target="{{ sum }}", temperature=0.6)
    with pytest.raises(TaskError, match="set the temperature to 0"):
        TasksBetween(session, folder, [file])


def test_an_evaluation_that_fails_leaves_the_session_as_it_was(
    session: Session, folder: Path, write_task: Callable[..., Path]
) -> None:
    rows = [{"q": "word " * 400, "sum": 1}]
    tasks = TasksBetween(
        session, folder, [write_task(rows, kind="generate_until", prompt="{{ q }}", target="{{ sum }}")]
    )
    before = session.weights_sha256()
    tasks.hold(0)
    with pytest.raises(Exception, match="context window"):
        tasks.work(lambda: False, 60.0)
    assert session.weights_sha256() == before
    assert tasks.work(lambda: False, 60.0) is None
