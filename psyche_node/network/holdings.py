"""What this node can serve: the complete blobs of its store, and what is there of those it receives. Any thread."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from psyche_node.network.assembly import Assembly
from psyche_node.network.blobs import PIECE_BYTES, Manifest, StoreError, piece_length
from psyche_node.network.messages import Kind
from psyche_node.network.pieces import pack
from psyche_node.network.reader import Checked, Reader

# How long an upload waits for a piece that this node is about to receive.
WAIT_SECONDS = 1.5
_MAX_KINDS = 4096


class Partial:
    """A blob that is being put together here, and read by others while it grows."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self.manifest: Manifest = assembly.manifest
        self.checked = Checked(assembly.manifest)
        self._held = bytearray(b"\1") * len(self.manifest.pieces)
        for index in assembly.missing():
            self._held[index] = 0
        self._changed = threading.Condition()
        self._ended = False

    def write(self, index: int, piece: bytes | memoryview) -> bool:
        """Verify a piece and keep it. Returns False when it is not the piece committed to."""
        if not self._assembly.write(index, piece):
            return False
        self.checked.mark(index, time.monotonic())
        with self._changed:
            self._held[index] = 1
            self._changed.notify_all()
        return True

    def finish(self) -> Path:
        """Give the complete blob its name. Raises StoreError while a piece is missing."""
        return self._assembly.finish()

    def end(self, *, keep: bool) -> None:
        """Nothing more comes. What is there is removed unless it was finished, or is to be ``kept``."""
        self._assembly.abandon(keep=keep)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def holds(self, index: int, seconds: float = 0.0) -> bool:
        """Return whether a piece is here, or arrives within ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._held[index] or self._ended, seconds)
            return bool(self._held[index])

    def bitmap(self) -> bytes:
        """Return which pieces are here: bit i of byte i/8."""
        return pack(self._held)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Open what is there for reading. Raises FileNotFoundError when it was finished or given up meanwhile."""
        descriptor = os.open(self._assembly.part, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class Holdings:
    """Complete and partial blobs, as other nodes see them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._partials: dict[bytes, Partial] = {}
        self._kinds: OrderedDict[bytes, tuple[Kind, int]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, assembly: Assembly) -> Partial:
        """Serve what is there of this blob from now on."""
        partial = Partial(assembly)
        with self._lock:
            self._partials[assembly.manifest.digest] = partial
        return partial

    def end(self, partial: Partial, *, keep: bool = False) -> None:
        """The blob is complete, or not wanted any more."""
        if not partial.manifest.pieces:
            return
        partial.end(keep=keep)
        with self._lock:
            if self._partials.get(partial.manifest.digest) is partial:
                del self._partials[partial.manifest.digest]

    def know(self, digest: bytes, kind: Kind, round: int) -> None:
        """Remember what a blob is, for its urgency."""
        with self._lock:
            self._kinds.pop(digest, None)
            self._kinds[digest] = (kind, round)
            if len(self._kinds) > _MAX_KINDS:
                self._kinds.popitem(last=False)

    def known(self, digest: bytes) -> tuple[Kind, int] | None:
        return self._kinds.get(digest)

    def complete(self, digest: bytes) -> bool:
        return self._reader.holds(digest)

    def partial(self, digest: bytes) -> Partial | None:
        return self._partials.get(digest)

    def manifest(self, digest: bytes) -> Manifest | None:
        """Return the manifest of a blob that is here, whole or in part. Raises StoreError when it went bad."""
        partial = self._partials.get(digest)
        return self._reader.manifest(digest) if partial is None else partial.manifest

    def pieces(self, digest: bytes, run: range) -> Iterator[bytes]:
        """Yield pieces in order. Ends early at one that is not here and does not come soon. Raises StoreError."""
        partial = self._partials.get(digest)
        if partial is None:
            yield from self._reader.pieces(digest, run)
            return
        try:
            with partial.opened() as descriptor:
                yield from self._growing(partial, descriptor, run)
        except FileNotFoundError:
            yield from self._reader.pieces(digest, run)

    def _growing(self, partial: Partial, descriptor: int, run: range) -> Iterator[bytes]:
        manifest = partial.manifest
        for index in run:
            # As many may wait as there are upload places, each of which has a thread: who gets nothing only asks again.
            if not partial.holds(index, WAIT_SECONDS):
                return
            piece = os.pread(descriptor, piece_length(manifest.length, index), index * PIECE_BYTES)
            if not partial.checked.is_right(index, piece, time.monotonic()):
                raise StoreError(
                    f"piece {index} of {manifest.digest.hex()[:16]} went bad on disk while it was received"
                )
            yield piece
