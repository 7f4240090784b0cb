"""Pieces of the store's blobs, read and checked for serving."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from psyche_node.network.blobs import (
    PIECE_BYTES,
    Manifest,
    StoreError,
    list_of,
    piece_digest,
    piece_length,
    read_list,
    write_list,
)
from psyche_node.network.store import BlobStore

# A piece that was right this long ago is served without another look, if its file has not changed.
CHECKED_SECONDS = 600.0
_MAX_REMEMBERED_PIECES = 1 << 19


class Checked:
    """What is known of one blob's file: its manifest, and when each piece was last seen to be right."""

    def __init__(self, manifest: Manifest, file: tuple[int, ...] | None = None, checked: float = -math.inf) -> None:
        self.manifest, self._file = manifest, file
        self._checked = [checked] * len(manifest.pieces)

    def check(self, file: tuple[int, ...]) -> None:
        """Take ``file``, as ``_identity`` gives it, for the one that was checked, or begin anew if it is another."""
        if self._file is None:
            self._file = file
        elif self._file != file:
            self._file, self._checked = file, [-math.inf] * len(self._checked)

    def mark(self, index: int, now: float) -> None:
        """The piece has just been seen to be right."""
        self._checked[index] = now

    def is_right(self, index: int, piece: bytes, now: float) -> bool:
        """Return whether this is the piece. It is hashed unless it was right lately."""
        if now - self._checked[index] > CHECKED_SECONDS:
            if piece_digest(piece) != self.manifest.pieces[index]:
                return False
            self._checked[index] = now
        return len(piece) == piece_length(self.manifest.length, index)


class Reader:
    """Reads pieces of the store's blobs for serving.

    An honest node must not be banned for a disk that rots, so a piece is checked before it leaves, unless it was within
    the last ten minutes and its file is the same since: what is read then is the page cache, not the disk.
    """

    def __init__(self, store: BlobStore, capacity: int = 512, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._capacity, self._clock = store, capacity, clock
        self._held: dict[bytes, Checked] = {}
        self._pieces = 0
        self._lock = threading.Lock()
        self._reading: dict[bytes, threading.Lock] = {}

    def remember(self, digest: bytes, manifest: Manifest, checked: Checked | None = None) -> None:
        """Keep a manifest that is known to be right, so that its file need not be read again.

        ``checked`` says when each piece was last seen to be right; without it that was just now.
        """
        self._keep(digest, checked or Checked(manifest, None, self._clock()))

    def holds(self, digest: bytes) -> bool:
        """Return whether the blob is in the store, complete."""
        return self._store.path(digest) is not None

    def manifest(self, digest: bytes) -> Manifest | None:
        """Return the manifest of a blob in the store, or None when it is not there (any more)."""
        held = self._known(digest)
        return None if held is None else held.manifest

    def pieces(self, digest: bytes, indices: Sequence[int]) -> Iterator[bytes]:
        """Yield pieces, each as ``bytes``. Raises StoreError when the file is gone or no longer holds them."""
        held, path = self._known(digest), self._store.path(digest)
        if held is None or path is None:
            raise StoreError(f"blob {digest.hex()[:16]} is not in the store")
        with path.open("rb", buffering=0) as file:
            held.check(_identity(os.fstat(file.fileno())))
            for index in indices:
                piece = os.pread(file.fileno(), piece_length(held.manifest.length, index), index * PIECE_BYTES)
                if not held.is_right(index, piece, self._clock()):
                    self._store.drop(digest)
                    raise StoreError(f"piece {index} of {path} went bad on disk; removed. Check this machine's disk")
                yield piece

    def _known(self, digest: bytes) -> Checked | None:
        path = self._store.path(digest)
        if path is None:
            return None
        if (held := self._held.get(digest)) is not None:
            return held
        if (manifest := read_list(list_of(path), digest)) is not None:
            return self._keep(digest, Checked(manifest))
        with self._lock:
            reading = self._reading.setdefault(digest, threading.Lock())
        # One at a time: ten peers that ask for the same large blob must not have it read ten times.
        with reading:
            try:
                return self._held.get(digest) or self._read(digest, path)
            finally:
                with self._lock:
                    self._reading.pop(digest, None)

    def _read(self, digest: bytes, path: Path) -> Checked | None:
        now = self._clock()
        try:
            file = _identity(path.stat())
            manifest = Manifest.of_file(path)
        except FileNotFoundError:
            return None
        if manifest.digest != digest:
            self._store.drop(digest)
            raise StoreError(f"{path} does not hold what its name says; removed. Check this machine's disk and memory")
        if manifest.is_long:
            write_list(list_of(path), manifest)
        return self._keep(digest, Checked(manifest, file, now))

    def _keep(self, digest: bytes, held: Checked) -> Checked:
        count = len(held.manifest.pieces)
        with self._lock:
            self._forget(digest)
            while self._held and (len(self._held) >= self._capacity or self._pieces + count > _MAX_REMEMBERED_PIECES):
                self._forget(next(iter(self._held)))
            self._held[digest] = held
            self._pieces += count
        return held

    def _forget(self, digest: bytes) -> None:
        if (held := self._held.pop(digest, None)) is not None:
            self._pieces -= len(held.manifest.pieces)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
