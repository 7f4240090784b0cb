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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordinator.run_config import RECIPE, ConfigError, RunSettings, SettingsTable

TERMS_OF_FOLDERS: Final = {
    "model_root": "--model",
    "layout_digest": "--model",
    "update_bytes": "--model",
    "data_manifest": "--data",
    "samples": "--data",
    "sequence_length": "--data",
}
"""Keys of `terms`, and the folder that each follows from."""


_CHEAP: Final = frozenset(TERMS_OF_FOLDERS) - {"model_root"}
"""Known without reading weights or sequences."""
_STANDING_IN: Final = {
    "model_root": "00" * 32,
    "layout_digest": "00" * 32,
    "update_bytes": 1,
    "data_manifest": "00" * 32,
    "samples": 1,
    "sequence_length": 1,
}


@dataclass(frozen=True, slots=True)
class Folders:
    """A model's and a prepared data folder, each None if it is not named, and the type of the trained weights."""

    model: Path | None
    data: Path | None
    precision: str

    @property
    def any(self) -> bool:
        return self.model is not None or self.data is not None

    def draft(self, table: SettingsTable) -> RunSettings:
        """The settings before the folders are looked at, with something standing in for what they will give.

        Raises:
            ConfigError: a key is missing, unknown or out of range.
        """
        given = table.terms()
        wanted = [key for key, flag in TERMS_OF_FOLDERS.items() if self._named(flag) and key not in given]
        return table.with_terms({key: _STANDING_IN[key] for key in wanted}).checked()

    def terms(self, table: SettingsTable, topk: int) -> dict[str, Any]:
        """The keys of `terms` that follow from the folders. Reads both of them whole.

        A recipe's value gives way to the folder's. What takes seconds is compared before anything is read for minutes.

        Raises:
            ConfigError: a folder cannot be used, or a file or --set gives another value for one of the keys.
        """
        words = ["terms", "--topk", str(topk), "--precision", self.precision, "--json"]
        words += [] if self.model is None else ["--model", str(self.model)]
        words += [] if self.data is None else ["--data", str(self.data)]
        written = {key for key in table.terms() if table.origin("terms", key) != RECIPE}
        if written & _CHEAP:
            self._compare(table, written, _ask([*words, "--quick"]))
        found = _ask(words)
        if (warning := found.pop("warning", None)) is not None:
            print(f"warning: {warning}", file=sys.stderr)
        self._compare(table, written, found)
        return found

    def _compare(self, table: SettingsTable, written: set[str], found: Mapping[str, Any]) -> None:
        given = table.terms()
        wrong = [
            f"  terms.{key} is {given[key]} ({table.origin('terms', key)}), but {self._named(TERMS_OF_FOLDERS[key])} "
            f"has {value}"
            for key, value in found.items()
            if key in written and not _same(given[key], value)
        ]
        if wrong:
            raise ConfigError(
                "the folders are not what the settings say; leave these keys out of the file and of --set, and the "
                "run takes what the folders have, or name other folders:\n" + "\n".join(wrong)
            )

    def _named(self, flag: str) -> str:
        folder = self.model if flag == "--model" else self.data
        return "" if folder is None else f"{flag} {folder}"


def _ask(words: list[str]) -> dict[str, Any]:
    """What `psyche-node` prints as JSON. Raises ConfigError with what it says if it fails."""
    plain = {**os.environ, "TYPER_USE_RICH": "0"}  # no boxes around what it says
    done = subprocess.run([sys.executable, "-m", "psyche_node.cli", *words], capture_output=True, env=plain)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigError(f"the folders cannot be used: {said or f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(done.stdout)
    found.pop("topk", None)
    return found


def _same(given: object, value: object) -> bool:
    return given.lower() == value if isinstance(given, str) else given == value
