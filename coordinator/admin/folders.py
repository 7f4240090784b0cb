"""The terms that follow from a model and a data folder, filled into a new run's settings.

Models and data are the node's business: its command `psyche-node terms` works the values out, in a process of its own,
as a node does before it joins. So this package needs no torch, and the two cannot disagree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from coordinator.run_config import ConfigError, Topk, TrainingSettings, validated
from coordinator.wording import Sources

TERMS_OF_FOLDERS: Final = {
    "model_root": "--model",
    "layout_digest": "--model",
    "update_bytes": "--model",
    "data_manifest": "--data",
    "samples": "--data",
    "sequence_length": "--data",
}
"""Keys of `terms`, and the folder that each follows from."""


class _Terms(BaseModel):
    """What has to be right of a run's terms before the folders are looked at."""

    topk: Topk = TrainingSettings.model_fields["topk"].default


class _Run(BaseModel):
    terms: _Terms = _Terms()


def terms_of_folders(
    table: Mapping[str, Any], model: Path | None, data: Path | None, precision: str, sources: Sources = ()
) -> dict[str, Any]:
    """The keys of `terms` that follow from the folders, with the topk that ``table`` has, which is from ``sources``.

    Raises:
        ConfigError: a folder cannot be used, or ``table`` gives another value for one of the keys, or no such topk.
    """
    topk = validated(_Run, table, "", sources).terms.topk
    given = table.get("terms", {})
    words = ["terms", "--topk", str(topk), "--precision", precision, "--json"]
    words += [] if model is None else ["--model", str(model)]
    words += [] if data is None else ["--data", str(data)]
    found = _ask(words)
    found.pop("topk", None)
    folders = {"--model": model, "--data": data}
    wrong = [
        f"  terms.{key} is {given[key]}, but {TERMS_OF_FOLDERS[key]} {folders[TERMS_OF_FOLDERS[key]]} has {value}"
        for key, value in found.items()
        if key in given and not _same(given[key], value)
    ]
    if wrong:
        text = "\n".join(wrong)
        raise ConfigError(
            "the folders are not what the settings say; leave these keys out, or --set terms.KEY=VALUE over them:\n"
            + text
        )
    return found


def _ask(words: list[str]) -> dict[str, Any]:
    """What `psyche-node` prints as JSON. Raises ConfigError with what it says if it fails."""
    plain = {**os.environ, "TYPER_USE_RICH": "0"}  # no boxes around what it says
    done = subprocess.run([sys.executable, "-m", "psyche_node.cli", *words], capture_output=True, env=plain)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(f"the folders cannot be used: {said or f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _same(given: object, value: object) -> bool:
    return given.lower() == value if isinstance(given, str) else given == value
