"""The terms that follow from a model and a data folder, filled into a new run's settings.

Models and data are the node's business: its command `psyche-node terms` works the values out, in a process of its own,
as a node does before it joins. So this package needs no torch, and the two cannot disagree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
    """A model's and a prepared data folder, each None if it is not named, and the type of the trained weights.

    ``other_tokenizer``: the data may have been prepared with another tokenizer than the model's.
    """

    model: Path | None
    data: Path | None
    precision: str
    other_tokenizer: bool = False

    @property
    def any(self) -> bool:
        return self.model is not None or self.data is not None

    def draft(self, table: SettingsTable) -> RunSettings:
        """The settings before the folders are read, with something standing in for what they will give.

        Raises:
            ConfigError: a key is missing, unknown or out of range, or a folder is not there; with all that is wrong.
        """
        given = table.terms()
        lacking = [key for key in TERMS_OF_FOLDERS if key not in given]
        standing_in = {key: _STANDING_IN[key] for key in lacking if self._named(TERMS_OF_FOLDERS[key])}
        wrong = list(self._unusable())
        try:
            settings = table.with_terms(standing_in).checked()
        except ConfigError as error:
            wrong.insert(0, str(error))
            for flag in sorted({TERMS_OF_FOLDERS[key] for key in lacking if key not in standing_in}):
                keys = ", ".join(key for key in lacking if TERMS_OF_FOLDERS[key] == flag)
                wrong.append(f"  {flag} FOLDER works out {keys}")
        else:
            if not wrong:
                return settings
            wrong.insert(0, "the folders cannot be used:")
        raise ConfigError("\n".join(wrong))

    def _unusable(self) -> Iterator[str]:
        """What can be seen at once of folders that are not what they should be."""
        for folder, flag, file, what in (
            (self.model, "--model", "config.json", "a Hugging Face model folder"),
            (self.data, "--data", "manifest.json", "a folder that `psyche-node data prepare` has made"),
        ):
            if folder is not None and not (folder / file).is_file():
                wrong = f"there is no {file} in it"
                if not folder.is_dir():
                    wrong = "it is a file" if folder.exists() else "there is no such folder"
                yield f"  {flag} {folder}: {wrong}; name {what}"

    def terms(
        self, table: SettingsTable, topk: int, warn: Callable[[str], None] = lambda warning: None
    ) -> dict[str, Any]:
        """The keys of `terms` that follow from the folders. Reads both of them whole. What the owner should know of
        them goes to ``warn``.

        A recipe's value gives way to the folder's. What takes seconds is compared before anything is read for minutes.

        Raises:
            ConfigError: a folder cannot be used, or a file or --set gives another value for one of the keys; or the
                data was prepared with another tokenizer than the model's, and that is not wanted.
        """
        words = ["terms", "--topk", str(topk), "--precision", self.precision, "--json", "--early"]
        words += [] if self.model is None else ["--model", str(self.model)]
        words += [] if self.data is None else ["--data", str(self.data)]
        written = {key for key in table.terms() if table.origin("terms", key) != RECIPE}
        found = _ask(words, lambda so_far: self._compare(table, written, so_far))
        for key in ("mismatch", "warning"):
            if (warning := found.pop(key, None)) is not None:
                warn(warning)
        return found

    def _compare(self, table: SettingsTable, written: set[str], found: Mapping[str, Any]) -> None:
        if (mismatch := found.get("mismatch")) is not None and not self.other_tokenizer:
            raise ConfigError(f"{mismatch}. If it is meant all the same: --other-tokenizer")
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


def _ask(words: list[str], check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The last line of JSON that `psyche-node` prints. What ``check`` raises of one ends it before the next.

    Raises ConfigError with what it says if it fails.
    """
    plain = {**os.environ, "TYPER_USE_RICH": "0"}  # no boxes around what it says
    command, found = [sys.executable, "-m", "psyche_node.cli", *words], dict[str, Any]()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=plain) as process,
    ):
        try:
            for line in process.stdout or ():
                found = json.loads(line)
                found.pop("topk", None)
                check(found)
        except BaseException:
            process.kill()
            raise
        if code := process.wait():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            raise ConfigError(f"the folders cannot be used: {said or f'exit code {code}'}")
    return found


def _same(given: object, value: object) -> bool:
    return given.lower() == value if isinstance(given, str) else given == value
