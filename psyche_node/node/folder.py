"""A node's folder belongs to one process at a time: two would sign with the same keys and write the same files."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
LOCK = "lock"
RUN = "run"
CHECKPOINT = "checkpoint"
# What a node writes over while it trains, and would not have written over by another run.
_RESULTS = (CHECKPOINT, "evaluations")


class FolderInUse(Exception):
    """Another process works with this folder; the message says which, and what to do."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make ``folder`` if it is missing, and keep others out of it. Raises FolderInUse, and OSError.

    The lock is the kernel's (flock): it ends with this process, however that ends. The file stays and says who held it
    last. Child processes do not inherit it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(
                f"{folder} is in use by another node, {_holder(path)}: stop that one, or give this one a --folder and "
                "a wallet of its own"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def keep_for_run(folder: Path, run: str) -> None:
    """Note that ``folder`` is for ``run`` (an address), and put aside the results of another one. Raises OSError.

    A checkpoint of run ABCD... becomes ``checkpoint-ABCDabcd``.
    """
    note = folder / RUN
    before = note.read_text().strip() if note.exists() else run
    for name in _RESULTS if before != run else ():
        aside = folder / f"{name}-{before[:8]}"
        if aside.exists():
            aside = folder / f"{aside.name}-{int(time.time())}"
        if (folder / name).exists():
            (folder / name).rename(aside)
            log.warning("%s was of run %s, and is now %s", folder / name, before, aside)
    note.write_text(f"{run}\n")


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(path.read_text())}"
    return f"whose number {path} does not say yet"
