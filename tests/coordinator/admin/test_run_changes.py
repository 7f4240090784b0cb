"""What `run set` makes of its arguments, for a run that has trained already."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.admin.changes import change_of
from coordinator.run_config import ConfigError
from coordinator.state import decode_run, float_bits

VECTORS = json.loads((Path(__file__).resolve().parent.parent.parent / "vectors" / "accounts.json").read_text())
RUN = decode_run(zlib.decompress(base64.b64decode(VECTORS["accounts"]["run"])))
TRAINED = replace(
    RUN,
    limits=replace(RUN.limits, total_rounds=1000),
    round=500,
    checkpoint_round=500,
    checkpoint_root=b"\x55" * 32,
    cursor=4000,
)


def test_other_optimizer_settings_keep_what_was_learned() -> None:
    change = change_of(TRAINED, ["terms.peak_lr=0.002"])
    assert change.terms is not None
    assert change.terms.model_root == TRAINED.checkpoint_root, "not the model that the run began with"
    assert change.terms.peak_lr_bits == float_bits(0.002)
    assert list(change.to_json(TRAINED)) == ["terms.peak_lr"]
    assert change.caution(TRAINED) is None


def test_another_model_or_other_data_is_cautioned_against() -> None:
    back = change_of(TRAINED, [f"terms.model_root={TRAINED.terms.model_root.hex()}"])
    assert "another model than its checkpoint of round 500" in str(back.caution(TRAINED))
    assert back.checkpoint(TRAINED) is None
    data = change_of(TRAINED, [f"terms.data_manifest={'ab' * 32}"])
    assert "positions begin at 0 again" in str(data.caution(TRAINED))


def test_a_run_whose_nodes_are_gone_is_taken_back_to_its_checkpoint() -> None:
    root = f"terms.model_root={TRAINED.checkpoint_root.hex()}"
    gone = replace(TRAINED, round=507, final_rounds=507, model_round=0)
    back = change_of(gone, [root])
    assert back.terms == replace(TRAINED.terms, model_root=TRAINED.checkpoint_root)
    assert (back.to_json(gone), back.checkpoint(gone)) == ({}, 500)
    assert back.text(gone) == ["the run goes on from its checkpoint of round 500, now"]
    assert str(back.caution(gone)) == (
        "Its checkpoint lacks what it has learned since round 500 (7 rounds), and that is lost."
    )
    with pytest.raises(ConfigError, match="nothing changes"):
        change_of(replace(gone, model_round=507), [root])
    with pytest.raises(ConfigError, match="nothing changes"):
        change_of(gone, [f"limits.batch={gone.limits.batch}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["terms.schedule=wsd"], "wsd needs it"),
        (["terms.schedule=cosine", "terms.decay_rounds=5"], "decay_rounds is for the schedule wsd"),
        (["terms.schedule=cosine", "terms.decay_rounds=0", "terms.warmup_rounds=1000000"], "at most the"),
        (["terms.ramp_batch=1", "terms.ramp_rounds=1000000"], "ramp_rounds must be at most"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_as_for_a_new_run(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        change_of(replace(TRAINED, terms=replace(TRAINED.terms, decay_rounds=0, schedule=2)), changes)


def test_a_new_schedule_spans_what_is_left_by_the_new_limits() -> None:
    run = replace(
        TRAINED,
        limits=replace(TRAINED.limits, total_rounds=600),
        terms=replace(TRAINED.terms, schedule=2, warmup_rounds=10, decay_rounds=0, ramp_rounds=0, ramp_batch=0),
    )
    assert change_of(run, ["terms.warmup_rounds=100"]).terms is not None
    with pytest.raises(ConfigError, match="100 of 600 rounds are left: warmup_rounds and decay_rounds together"):
        change_of(run, ["terms.warmup_rounds=101"])
    assert change_of(run, ["terms.warmup_rounds=101", "limits.total_rounds=601"]).terms is not None
