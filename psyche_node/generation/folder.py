"""Whether a folder looks like a model's: known at once, before torch is loaded to read it."""

from __future__ import annotations

import json
from pathlib import Path

from psyche_node.folder_files import MODEL_CONFIG, hub_hint
from psyche_node.generation.errors import GenerationError

_INSIDE = ("model", "checkpoint")
"""Where the model is in the folder of a simulation, and in that of a node."""


def check_folder(folder: Path) -> None:
    """Raises GenerationError: there is no such folder, or it has no config.json that can be read."""
    if (file := folder / MODEL_CONFIG).is_file():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GenerationError(f"{file} is not JSON ({error}). Fetch it again") from error
        return
    near = next((inside for name in _INSIDE if ((inside := folder / name) / MODEL_CONFIG).is_file()), None)
    if near is not None:
        raise GenerationError(f"{folder} has no {MODEL_CONFIG}. Did you mean {near}?")
    if folder.is_dir():
        wrong = f"{folder} has no {MODEL_CONFIG}"
    else:
        wrong = f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}"
    hint = hub_hint(folder)
    raise GenerationError(f"{wrong}. Name a model folder, such as the checkpoint of a finished run{hint}")
