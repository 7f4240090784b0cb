"""The output folder of a simulation: new or empty when it begins, and as it was before if nothing came of it."""

from __future__ import annotations

import shutil
from pathlib import Path


class OutFolder:
    """Claims ``path`` for a simulation: makes it and its parents. Nothing is overwritten.

    Raises:
        FileExistsError: there is something in it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not empty; name a new folder with --out")
        self._path = path
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)

    def give_back(self) -> None:
        """Remove what was put into it, it itself and its parents where they are new. Raises OSError."""
        for entry in self._path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        for folder in self._made:
            if any(folder.iterdir()):  # somebody else uses the parent by now
                return
            folder.rmdir()
