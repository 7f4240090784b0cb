"""One blob put together from pieces that arrive in any order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from psyche_node.network.blobs import PIECE_BYTES, Manifest, StoreError, list_of, piece_digest, piece_length

# A file grows by so many pieces at a time; what it holds of them before they are here is zeros, on no disk.
EXTENDED_PIECES = 64


class Assembly:
    """One blob being put together; several sources may bring pieces at the same time."""

    def __init__(self, manifest: Manifest, part: Path, target: Path, *, resume: bool = False) -> None:
        self.manifest = manifest
        self.part, self._target = part, target
        self._missing = set(range(len(manifest.pieces)))
        self._lock = threading.Lock()
        self._descriptor = os.open(part, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o600)
        self._open = True
        self._finished = False
        self._extended = os.fstat(self._descriptor).st_size // PIECE_BYTES
        if resume:
            # Not without need: ext4 flushes a file that was truncated to nothing when it is closed.
            if os.fstat(self._descriptor).st_size > manifest.length:
                os.ftruncate(self._descriptor, manifest.length)
            self._missing.difference_update(self._found())

    def missing(self) -> list[int]:
        """Return the indices of the pieces that are not here yet, in order."""
        with self._lock:
            return sorted(self._missing)

    def _found(self) -> Iterable[int]:
        # Nothing is trusted but the hashes: the machine may have gone down between the pieces and their being on disk.
        for index, digest in enumerate(self.manifest.pieces):
            piece = os.pread(self._descriptor, piece_length(self.manifest.length, index), index * PIECE_BYTES)
            if not piece:
                return
            if piece_digest(piece) == digest:
                yield index

    def write(self, index: int, piece: bytes | memoryview) -> bool:
        """Verify a piece and keep it. Returns False, and keeps nothing, when it is not the piece committed to."""
        manifest = self.manifest
        if not 0 <= index < len(manifest.pieces) or len(piece) != piece_length(manifest.length, index):
            return False
        if piece_digest(piece) != manifest.pieces[index]:
            return False
        with self._lock:
            if self._open and index in self._missing:
                self._extend(index)
                written = 0
                while written < len(piece):
                    written += os.pwrite(self._descriptor, piece[written:], index * PIECE_BYTES + written)
                self._missing.discard(index)
        return True

    def _extend(self, index: int) -> None:
        """Let the file end well behind a piece, or at the blob's end, before that is written.

        Each write that makes a file longer costs ext4 several times as much as one that does not.
        """
        if index >= self._extended:
            self._extended = min(index + EXTENDED_PIECES, len(self.manifest.pieces))
            os.ftruncate(self._descriptor, min(self._extended * PIECE_BYTES, self.manifest.length))

    def finish(self) -> Path:
        """Give the complete blob its name, once. Raises StoreError while a piece is missing."""
        with self._lock:
            if self._finished:
                return self._target
            if self._missing or not self._open:
                raise StoreError(f"{self._target.name[:16]} is not complete: {len(self._missing)} pieces are missing")
            self._close()
            # Nothing waits for the disk here: a blob that a power cut takes is fetched again, and one that it leaves
            # half-written is found by ``BlobStore.sweep``.
            os.replace(self.part, self._target)
            self._finished = True
            if not self.manifest.is_long:
                list_of(self._target).unlink(missing_ok=True)
            return self._target

    def abandon(self, *, keep: bool = False) -> None:
        """End it, unless it was finished. ``keep`` leaves what there is to a later ``resume``."""
        with self._lock:
            if self._open:
                self._close()
                if not keep:
                    self.part.unlink(missing_ok=True)
                    list_of(self._target).unlink(missing_ok=True)

    def _close(self) -> None:
        self._open = False
        os.close(self._descriptor)
