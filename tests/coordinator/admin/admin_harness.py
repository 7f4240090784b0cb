"""Running `psyche-admin` in tests, and the settings of their runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runs import UPDATE_BYTES
from solders.pubkey import Pubkey
from typer.testing import CliRunner

from coordinator.admin import app

HEX = "01" * 32
CONFIG = f"""
run_id = "from-a-file"
[limits]
init_min_members = 2
min_members = 2
max_members = 8
join_grace = 1
batch = 8
rounds_per_epoch = 4
total_rounds = 4
[terms]
model_root = "{HEX}"
layout_digest = "{HEX}"
data_manifest = "{HEX}"
samples = 100
sequence_length = 16
update_bytes = {UPDATE_BYTES}
peak_lr = 1e-3
schedule = "cosine"
model_source = "hub:demo/model"
"""


def admin(*arguments: str | Path | Pubkey, status: int = 0) -> str:
    """What a command prints; its errors where it is expected to fail."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr if status else result.stdout


def admin_json(*arguments: str | Path | Pubkey, status: int = 0) -> Any:
    """What a command prints with --json."""
    result = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)
