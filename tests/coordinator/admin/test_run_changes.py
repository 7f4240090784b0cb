"""What `run set` makes of its arguments, for a run that has trained already."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path

from coordinator.admin.changes import change_of
from coordinator.state import decode_run, float_bits

VECTORS = json.loads((Path(__file__).resolve().parent.parent.parent / "vectors" / "accounts.json").read_text())
RUN = decode_run(zlib.decompress(base64.b64decode(VECTORS["accounts"]["run"])))
TRAINED = replace(RUN, round=500, checkpoint_round=500, checkpoint_root=b"\x55" * 32, cursor=4000)


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
    data = change_of(TRAINED, [f"terms.data_manifest={'ab' * 32}"])
    assert "positions begin at 0 again" in str(data.caution(TRAINED))
