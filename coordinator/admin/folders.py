"""The terms that follow from a model and a data folder, filled into a new run's settings.

Models and data are the node's business: its command `psyche-node terms` works the values out, in a process of its own,
as a node does before it joins. So this package needs no torch, and the two cannot disagree.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from coordinator.run_config import ConfigError, TrainingSettings

TERMS_OF_FOLDERS: Final = {
    "model_root": "--model",
    "layout_digest": "--model",
    "update_bytes": "--model",
    "data_manifest": "--data",
    "samples": "--data",
    "sequence_length": "--data",
}
"""Keys of `terms`, and the folder that each follows from."""


def terms_of_folders(table: Mapping[str, Any], model: Path | None, data: Path | None, precision: str) -> dict[str, Any]:
    """The keys of `terms` that follow from the folders, with the topk that ``table`` has.

    Raises:
        ConfigError: a folder cannot be used, or ``table`` gives another value for one of the keys.
    """
    given = table.get("terms", {})
    given = given if isinstance(given, Mapping) else {}
    topk = given.get("topk", TrainingSettings.model_fields["topk"].default)
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
    done = subprocess.run([sys.executable, "-m", "psyche_node.cli", *words], capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError("the folders cannot be used: " + (lines[-1] if lines else f"exit code {done.returncode}"))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _same(given: object, value: object) -> bool:
    return given.lower() == value if isinstance(given, str) else given == value
