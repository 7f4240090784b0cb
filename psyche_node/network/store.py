"""The content-addressed blob store: files named by digest, in one folder per round, never half-written.

    FOLDER/<round>/<digest hex>          a complete blob
    FOLDER/<round>/<digest hex>.*.part   one being written; removed when its writer is gone
    FOLDER/<round>/<digest hex>.part     one being put together from pieces; survives its writer, so that it can go on
    FOLDER/<round>/<digest hex>.list     the manifest of a blob of several pieces: its length and their digests
    FOLDER/boot                          which start of the machine the blobs were last read and checked under

A blob is cut into pieces of 1 MiB, the unit of transfer, verification and blame. Its digest is a BLAKE3 root over its
length and the BLAKE3 digests of its pieces, so one digest from the chain vouches for every piece. Supervisor and
network process use the same folder; nothing is cached between them but the files.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

PIECE_BYTES = 1 << 20
DIGEST_BYTES = 32
# A piece that was right this long ago is served without another look, if its file has not changed.
CHECKED_SECONDS = 600.0
# A file grows by so many pieces at a time; what it holds of them before they are here is zeros, on no disk.
EXTENDED_PIECES = 64
# What an earlier process left unfinished is kept up to here, the newest first; the rest is fetched again.
MAX_KEPT = 64
MAX_KEPT_BYTES = 1 << 38
# A blob of more pieces keeps its list, so that serving it after a restart does not begin with reading all of it.
LONG_LIST = 256
_MAX_REMEMBERED_PIECES = 1 << 19
_ROOT_CONTEXT = "psyche-node 2026-11 blob root: u64 length, then the digests of its 1 MiB pieces"


class StoreError(Exception):
    """The store refused a blob or lost one; the message says which and why."""


def piece_count(length: int) -> int:
    """Return how many pieces a blob of ``length`` bytes has; an empty blob has none."""
    return -(-length // PIECE_BYTES)


def piece_length(length: int, index: int) -> int:
    """Return the bytes of piece ``index`` of a blob of ``length`` bytes."""
    return min(PIECE_BYTES, length - index * PIECE_BYTES)


def piece_digest(piece: bytes | memoryview) -> bytes:
    return blake3(piece).digest()


def blob_root(length: int, pieces: Iterable[bytes]) -> bytes:
    """Return the digest of a blob from its length in bytes and the 32-byte digests of its pieces, in order."""
    root = blake3(struct.pack("<Q", length), derive_key_context=_ROOT_CONTEXT)
    for digest in pieces:
        root.update(digest)
    return root.digest()


def blob_digest(data: bytes | memoryview) -> bytes:
    """Return the digest of a blob that is in memory."""
    view = memoryview(data)
    return blob_root(len(view), (piece_digest(view[at : at + PIECE_BYTES]) for at in range(0, len(view), PIECE_BYTES)))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What it takes to verify a blob piece by piece."""

    length: int
    pieces: tuple[bytes, ...]

    @property
    def digest(self) -> bytes:
        return blob_root(self.length, self.pieces)

    @classmethod
    def of_file(cls, path: Path) -> Manifest:
        pieces = []
        length = 0
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                pieces.append(piece_digest(piece))
                length += len(piece)
        return cls(length, tuple(pieces))


class BlobStore:
    """Blobs by digest, dropped by round. Safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def adopt(self, path: Path, round: int) -> tuple[bytes, int]:
        """Move the file at ``path`` into the store. Returns its digest and length in bytes.

        The file must not change any more. It stays durable: its content is on disk before it gets its name.
        """
        manifest = Manifest.of_file(path)
        target = self._place(manifest.digest, round)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.replace(path, target)
        except OSError:
            # Another file system: copy, under a name that is no blob yet.
            part = self._part(target)
            shutil.copyfile(path, part)
            _finish(part, target)
            path.unlink()
        _sync_folder(target.parent)
        return manifest.digest, manifest.length

    def put(self, data: bytes | memoryview, round: int) -> tuple[bytes, int]:
        """Write a blob from memory. Returns its digest and length in bytes."""
        digest = blob_digest(data)
        target = self._place(digest, round)
        part = self._part(target)
        part.write_bytes(data)
        _finish(part, target)
        _sync_folder(target.parent)
        return digest, len(data)

    def path(self, digest: bytes) -> Path | None:
        """Return the file of a complete blob, or None."""
        # Asked for each of up to 256 digests of a call, so with strings: paths take twice as long.
        name = digest.hex()
        for round in self._rounds():
            candidate = f"{self.folder}/{round}/{name}"
            if os.path.isfile(candidate):
                return Path(candidate)
        return None

    def begin(self, manifest: Manifest, round: int) -> Assembly:
        """Start to assemble a blob from pieces that arrive in any order."""
        target = self._place(manifest.digest, round)
        return Assembly(manifest, self._part(target), target)

    def resume(self, manifest: Manifest, round: int) -> Assembly:
        """Like ``begin``, but what arrives outlives this process, and what an earlier one left is checked and used.

        At most one of a blob and round at a time. Reads all of what is there.
        """
        target = self._place(manifest.digest, round)
        write_list(_list_of(target), manifest)
        return Assembly(manifest, target.with_name(f"{target.name}.part"), target, resume=True)

    def unfinished(self, digest: bytes, length: int, round: int) -> Manifest | None:
        """Return the manifest of a blob that an earlier process began to assemble with ``resume``, or None."""
        target = self.folder / str(round) / digest.hex()
        manifest = read_list(_list_of(target), digest)
        return manifest if manifest is not None and manifest.length == length else None

    def drop(self, digest: bytes) -> None:
        """Remove one blob, if it is there."""
        while (path := self.path(digest)) is not None:
            path.unlink(missing_ok=True)
            _list_of(path).unlink(missing_ok=True)

    def forget(self, before_round: int) -> None:
        """Remove every blob of rounds before ``before_round``."""
        for round in self._rounds():
            if round < before_round:
                shutil.rmtree(self.folder / str(round), ignore_errors=True)

    def sweep(self) -> int:
        """Remove what an earlier, killed process left unfinished and nobody can go on with, and after a crash of the
        machine what is not whole. Returns how many files.

        Only for the process that assembles blobs, at its start. What can be gone on with is kept within bounds, and
        what another process that lives is writing is left alone.
        """
        kept, room, removed = 0, MAX_KEPT_BYTES, 0
        parts = []
        for part in self.folder.glob("*/*.part"):
            # It may get its name at any moment.
            with contextlib.suppress(FileNotFoundError):
                if not _is_being_written(part):
                    parts.append((part.stat(), part))
        for stat, part in sorted(parts, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
            whole = part.with_suffix("")
            if _list_of(whole).exists() and kept < MAX_KEPT and stat.st_size <= room:
                kept += 1
                room -= stat.st_size
                continue
            part.unlink(missing_ok=True)
            _list_of(whole).unlink(missing_ok=True)
            removed += 1
        for orphan in self.folder.glob("*/*.list"):
            whole = orphan.with_suffix("")
            if not whole.exists() and not whole.with_name(f"{whole.name}.part").exists():
                orphan.unlink(missing_ok=True)
        return removed + self._drop_what_a_crash_broke()

    def _drop_what_a_crash_broke(self) -> int:
        """Read all blobs if the machine has been started since the last time, and remove those that are not whole.

        What a process wrote survives the process. It takes a power cut, or a kernel that dies, to lose bytes of a file
        that has its name already.
        """
        mark, boot = self.folder / "boot", _boot_id()
        with contextlib.suppress(OSError):
            if boot and mark.read_text() == boot:
                return 0
        removed = 0
        for path in self.folder.glob("*/*"):
            if path.suffix or not path.parent.name.isdecimal():
                continue
            with contextlib.suppress(FileNotFoundError):
                if Manifest.of_file(path).digest.hex() != path.name:
                    path.unlink()
                    _list_of(path).unlink(missing_ok=True)
                    removed += 1
        mark.write_text(boot)
        return removed

    def _rounds(self) -> list[int]:
        # Newest first: what is asked for is nearly always of the round in flight.
        with contextlib.suppress(FileNotFoundError):
            return sorted((int(name) for name in os.listdir(self.folder) if name.isdecimal()), reverse=True)
        return []

    def _place(self, digest: bytes, round: int) -> Path:
        if round < 0:
            raise StoreError(f"a blob belongs to a round from 0 on, not to {round}")
        folder = self.folder / str(round)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder / digest.hex()

    @staticmethod
    def _part(target: Path) -> Path:
        return target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


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
            # half-written is found by ``sweep``.
            os.replace(self.part, self._target)
            self._finished = True
            if len(self.manifest.pieces) <= LONG_LIST:
                _list_of(self._target).unlink(missing_ok=True)
            return self._target

    def abandon(self, *, keep: bool = False) -> None:
        """End it, unless it was finished. ``keep`` leaves what there is to a later ``resume``."""
        with self._lock:
            if self._open:
                self._close()
                if not keep:
                    self.part.unlink(missing_ok=True)
                    _list_of(self._target).unlink(missing_ok=True)

    def _close(self) -> None:
        self._open = False
        os.close(self._descriptor)


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
        if (manifest := read_list(_list_of(path), digest)) is not None:
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
        if len(manifest.pieces) > LONG_LIST:
            write_list(_list_of(path), manifest)
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


def _boot_id() -> str:
    """Return what is different after each start of this machine; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def write_list(path: Path, manifest: Manifest) -> None:
    """Write a manifest to a file, whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    part.write_bytes(struct.pack("<Q", manifest.length) + b"".join(manifest.pieces))
    os.replace(part, path)


def read_list(path: Path, digest: bytes) -> Manifest | None:
    """Return the manifest in a file, or None when there is none that leads to ``digest``."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) < 8:
        return None
    pieces = tuple(raw[at : at + DIGEST_BYTES] for at in range(8, len(raw), DIGEST_BYTES))
    manifest = Manifest(struct.unpack("<Q", raw[:8])[0], pieces)
    return manifest if len(pieces) == piece_count(manifest.length) and manifest.digest == digest else None


def _is_being_written(part: Path) -> bool:
    """Return whether another process that lives has this unfinished file; its name says which."""
    writer = part.suffixes[-2].removeprefix(".").partition("-")[0] if len(part.suffixes) > 1 else ""
    if not writer.isdecimal() or int(writer) == os.getpid():
        return False
    try:
        os.kill(int(writer), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _list_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.list")


def _finish(part: Path, target: Path) -> None:
    descriptor = os.open(part, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, target)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


__all__ = [
    "DIGEST_BYTES",
    "PIECE_BYTES",
    "Assembly",
    "BlobStore",
    "Checked",
    "Manifest",
    "Reader",
    "StoreError",
    "blob_digest",
    "blob_root",
    "piece_count",
    "piece_digest",
    "piece_length",
]
