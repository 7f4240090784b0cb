"""Documents on disk while a data set is prepared: only their lengths stay in memory."""

from __future__ import annotations

import contextlib
import tempfile
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

_TRAINED = np.uint32(1 << 31)
LARGEST_TOKEN = (1 << 31) - 1

Document = tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]
"""Token ids (L,) and which of them are trained (L,)."""


class Spill:
    """Documents in the order of appending, in a file without a name: it is gone when the process is.

    ``tokens`` is how many the documents for training have, which is what the manifest counts.
    """

    def __init__(self, folder: Path) -> None:
        self._made = None if folder.exists() else folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115
        self._lengths = array("I")
        self._held = bytearray()
        self.tokens = 0

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *raised: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        if self._made is not None and raised[0] is not None:
            with contextlib.suppress(OSError):  # not empty: shards were written, which the next attempt takes over
                self._made.rmdir()

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, document: Document, *, heldout: bool) -> None:
        """Token ids are at most ``LARGEST_TOKEN``."""
        ids, trained = document
        self._file.write(np.where(trained, ids | _TRAINED, ids).astype("<u4").tobytes())
        self._lengths.append(len(ids))
        self._held.append(heldout)
        self.tokens += 0 if heldout else len(ids)

    def hold_out(self, document: int) -> None:
        """Put a document on the other side of the split."""
        self.tokens -= 0 if self._held[document] else self._lengths[document]
        self._held[document] = True

    def numbers(self, *, heldout: bool) -> npt.NDArray[np.int64]:
        """The documents of one side of the held-out split, in order."""
        return np.flatnonzero(np.frombuffer(self._held, dtype=np.uint8) == heldout)

    def reader(self) -> SpillReader:
        """What has been appended so far; to be closed before the next ``append``."""
        self._file.flush()
        return SpillReader(self._file, np.array(self._lengths, dtype=np.int32))


class SpillReader:
    """Documents by number. ``lengths`` (n,) are in tokens."""

    def __init__(self, file: IO[bytes], lengths: npt.NDArray[np.int32]) -> None:
        self.lengths = lengths
        self._ends = np.cumsum(lengths, dtype=np.int64)
        empty = not len(lengths)
        self._tokens = np.empty(0, "<u4") if empty else np.memmap(file, dtype="<u4", mode="r")

    def __getitem__(self, document: int) -> Document:
        end = int(self._ends[document])
        marked = self._tokens[end - int(self.lengths[document]) : end]
        return marked & ~_TRAINED, (marked & _TRAINED) != 0
