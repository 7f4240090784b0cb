"""The handler of the supervisor's requests, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import RandomData, serving

from psyche_node.exits import Exit, exit_for
from psyche_node.training import messages as m
from psyche_node.training.errors import NotTheRuns

RUN = "ab" * 32


def test_an_update_that_cannot_be_written_is_taken_back(model_dir: Path, data: RandomData, tmp_path: Path) -> None:
    """Its round is as one that left it out: nothing of it is looked ahead to, and its gradient is in the next one."""

    def rounds(fails: bool) -> list[bytes]:
        trainer, session = serving(model_dir, data)
        first, second = tmp_path / f"first{fails}", tmp_path / f"second{fails}"
        train = m.Train(round=0, positions=[4, 5], run=RUN, member=0, out_path=str(first))
        if fails:
            first.mkdir()
            with pytest.raises(OSError, match="first"):
                trainer.handle(train)
            assert list(tmp_path.glob("*.writing")) == []
        else:
            trainer.handle(train)
            assert list(session.optimizer.travelling) == [0]
            trainer.handle(m.Apply(round=0, paths=[], included=False))
        assert session.optimizer.travelling == {}
        trainer.handle(m.Train(round=1, positions=[7, 8], run=RUN, member=0, out_path=str(second)))
        trainer.handle(m.Apply(round=1, paths=[str(second)], included=True))
        assert session.optimizer.travelling == {}
        return [second.read_bytes(), session.weights_sha256().encode()]

    assert rounds(fails=True) == rounds(fails=False)


def test_whatever_keeps_an_update_from_being_written_takes_it_back(model_dir: Path, data: RandomData) -> None:
    trainer, session = serving(model_dir, data)
    with pytest.raises(ValueError, match="null"):
        trainer.handle(m.Train(round=0, positions=[4, 5], run=RUN, member=0, out_path="no\0path"))
    assert session.optimizer.travelling == {}


def test_another_model_than_the_runs_is_told_before_what_else_is_wrong(
    model_dir: Path, data: RandomData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vocabulary is too small for the run's data, which is no reason to prepare the data again."""
    _, session = serving(model_dir, data)
    run = {"layout_digest": session.optimizer.layout.digest.hex(), "model_root": session.model_root().hex()}
    assert serving(model_dir, data, **run)[1].model_root() == session.model_root()
    for file in model_dir.iterdir():
        shutil.copy(file, tmp_path)
    values = json.loads((model_dir / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(values | {"vocab_size": data.vocabulary - 1}))
    monkeypatch.setattr("psyche_node.training.preparing.load_into", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(NotTheRuns, match=f"is not the run's, whose model root is {run['model_root']}") as caught:
        serving(tmp_path, data, **run)
    assert exit_for(caught.value) is Exit.CONFIG
    assert f"Get the run's model into {tmp_path}" in str(caught.value)
