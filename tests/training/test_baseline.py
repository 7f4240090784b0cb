"""The AdamW baseline: learns, finds its learning rate, sees the positions it is given."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import RandomData, terms

from psyche_node.training import Session, TrainingError, run_adamw
from psyche_node.training.baseline import _search

ROUNDS = [list(range(r * 8, r * 8 + 8)) for r in range(24)]


def test_it_learns_on_the_given_positions(model_dir: Path, data: RandomData) -> None:
    lines: list[str] = []
    run = run_adamw(
        model_dir, data, terms(), ROUNDS, learning_rate=0.01, evaluate_every=10, device="cpu", progress=lines.append
    )
    assert len(run.loss) == 24
    assert [at for at, _ in run.heldout_curve] == [0, 10, 20, 24]
    assert run.heldout_curve[0][1] - run.heldout_loss > 0.5
    assert run.heldout_loss == run.heldout_curve[-1][1]
    assert run.learning_rate == 0.01
    assert run.tried == {}
    assert len(lines) == 3
    session = Session(model_dir, data, terms(), device="cpu")
    assert run.heldout_curve[0][1] == pytest.approx(session.evaluate()[0], rel=1e-6), "the same model, the same judge"
    assert run.loss[0] == pytest.approx(session.train(0, ROUNDS[0], run=bytes(32), member=0).loss, rel=1e-6)


def test_the_search_ends_with_the_initial_model_untouched(model_dir: Path, data: RandomData) -> None:
    run = run_adamw(model_dir, data, terms(), ROUNDS[:13], device="cpu")
    again = run_adamw(model_dir, data, terms(), ROUNDS[:13], device="cpu", learning_rate=run.learning_rate)
    assert run.tried[run.learning_rate] == min(run.tried.values())
    assert len(run.tried) >= 3
    assert run.loss == again.loss


def test_the_grid_grows_until_the_best_is_inside() -> None:
    tried: dict[float, float] = {}
    assert _search(lambda rate: abs(math.log(rate / 0.032)), tried, lambda line: None) == 0.032
    assert max(tried) == 0.064
    tried = {}
    assert _search(lambda rate: rate if rate < 0.003 else math.nan, tried, lambda line: None) == min(tried)
    with pytest.raises(TrainingError, match="diverged at every learning rate"):
        _search(lambda rate: math.nan, {}, lambda line: None)


def test_no_rounds(model_dir: Path, data: RandomData) -> None:
    with pytest.raises(TrainingError, match="no round"):
        run_adamw(model_dir, data, terms(), [])
