"""Files of rank 0's host, copied to the other hosts of a site piece by piece.

Rank 0 reads, and one rank of every other host writes. The rest are not there: in a round of large updates each would be
sent tens of gigabytes for nothing. Whoever fails goes through the pieces all the same, so that nobody waits for it in
vain, and says so in the end.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import torch
import torch.distributed as dist

PIECE = 16 << 20
"""Bytes of a file that are sent at a time."""

Part = Literal["reads", "writes"]
_WORDS = {
    "reads": ("read the update", "Look at that disk"),
    "writes": ("keep a copy of an update in", "Make room there, or set TMPDIR to a folder that has it"),
}


def copy_files(part: Part, files: Sequence[tuple[Path, Path, int]], hosts: dist.ProcessGroup) -> OSError | None:
    """Copy files from where rank 0 has them to a place on this host, each of so many bytes; (from, to, bytes).

    All ranks of ``hosts`` call it together: one of each host, rank 0 among them. Returns what failed on this one,
    naming host and file.
    """
    end = _End(part)
    for source, place, size in files:
        end.open(source if part == "reads" else place)
        for start in range(0, size, PIECE):
            piece = torch.zeros(min(PIECE, size - start), dtype=torch.uint8)
            if part == "reads":
                end.read(piece.numpy().data)
            dist.broadcast(piece, src=0, group=hosts)
            if part == "writes":
                end.write(piece.numpy().data)
        end.close()
    return end.failure


class _End:
    """This rank's end of the files. After a failure nothing is done any more."""

    def __init__(self, part: Part) -> None:
        self.failure: OSError | None = None
        self._part = part
        self._path = Path()
        self._file: BinaryIO | None = None

    def open(self, path: Path) -> None:
        self._path = path
        if self.failure is None:
            self._do(lambda: setattr(self, "_file", path.open("rb" if self._part == "reads" else "wb")))

    def read(self, piece: memoryview) -> None:
        def all_of_it(file: BinaryIO) -> None:
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise OSError("it became shorter while it was read")

        self._with_file(all_of_it)

    def write(self, piece: memoryview) -> None:
        self._with_file(lambda file: file.write(piece))

    def close(self) -> None:
        """Some of what was written may reach the disk only now."""
        if self._file is not None:
            self._do(self._file.close)
        self._file = None

    def _with_file(self, step: Callable[[BinaryIO], object]) -> None:
        if (file := self._file) is not None and self.failure is None:
            self._do(lambda: step(file))

    def _do(self, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as error:
            does, remedy = _WORDS[self._part]
            self.failure = self.failure or OSError(
                f"host {socket.gethostname()} cannot {does} {self._path}: {error}. {remedy}"
            )
