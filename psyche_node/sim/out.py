"""The output folder of a simulation: new or empty when it begins, and as it was before if nothing came of it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from uuid import uuid4

LOGS = "logs"
"""The folder inside that holds a log per process."""


class OutFolder:
    """Claims ``path`` for one simulation: makes it, its parents and its folder of logs. Nothing is overwritten.

    Whoever makes the folder of logs has the claim, so two simulations that begin at the same moment cannot both.

    Raises:
        FileExistsError: there is something in it, or it is another simulation's.
        OSError: no folder can be made there.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "exists and is not empty" if path.is_dir() else "is a file"
            raise FileExistsError(f"{path} {what}; name a new folder with --out")
        self._path = path
        new = not path.exists()
        self._made = [folder for folder in [*path.parents][::-1] if _make(folder)][::-1]
        if new:
            self._made.insert(0, path)
        if not (_appears(path) if new else _make(path / LOGS)):
            raise FileExistsError(f"{path} is another simulation's; name a new folder with --out")

    def give_back(self) -> None:
        """Remove what was put into it, it itself and its parents where this made them. Raises OSError."""
        logs = self._path / LOGS
        for entry in self._path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                if entry != logs:
                    shutil.rmtree(entry)
            else:
                entry.unlink()
        # Last, with the claim: nobody else's is in the folder before.
        shutil.rmtree(logs)
        with contextlib.suppress(OSError):  # not empty: another simulation uses it by now
            for folder in self._made:
                folder.rmdir()


def _make(folder: Path) -> bool:
    """Make a folder whose parent is there; return whether this process did."""
    if folder.is_dir():
        return False
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise _not_made(folder, error) from error
    return True


def _appears(path: Path) -> bool:
    """Make a folder that holds the claim from its first moment; return whether this process did, and not another."""
    draft = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        (draft / LOGS).mkdir(parents=True)
        draft.rename(path)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if path.exists():
            return False
        raise _not_made(path, error) from error
    return True


def _not_made(folder: Path, error: OSError) -> OSError:
    return OSError(f"{folder} cannot be made: {error.strerror}; name another folder with --out")
