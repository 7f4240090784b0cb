"""The content-addressed blob store: files named by digest, in one folder per round, never half-written.

    FOLDER/<round>/<digest hex>          a complete blob
    FOLDER/<round>/<digest hex>.*.part   one being written; removed when its writer is gone
    FOLDER/<round>/<digest hex>.part     one being put together from pieces; survives its writer, so that it can go on
    FOLDER/<round>/<digest hex>.list     the manifest of a blob of several pieces: its length and their digests
    FOLDER/boot                          which start of the machine the blobs were last read and checked under

Supervisor and network process use the same folder; nothing is cached between them but the files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from psyche_node.network.assembly import Assembly
from psyche_node.network.blobs import Manifest, StoreError, blob_digest, list_of, read_list, write_list

# What an earlier process left unfinished is kept up to here, the newest first; the rest is fetched again.
MAX_KEPT = 64
MAX_KEPT_BYTES = 1 << 38


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
        write_list(list_of(target), manifest)
        return Assembly(manifest, target.with_name(f"{target.name}.part"), target, resume=True)

    def unfinished(self, digest: bytes, length: int, round: int) -> Manifest | None:
        """Return the manifest of a blob that an earlier process began to assemble with ``resume``, or None."""
        target = self.folder / str(round) / digest.hex()
        manifest = read_list(list_of(target), digest)
        return manifest if manifest is not None and manifest.length == length else None

    def drop(self, digest: bytes) -> None:
        """Remove one blob, if it is there."""
        while (path := self.path(digest)) is not None:
            path.unlink(missing_ok=True)
            list_of(path).unlink(missing_ok=True)

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
            if list_of(whole).exists() and kept < MAX_KEPT and stat.st_size <= room:
                kept += 1
                room -= stat.st_size
                continue
            part.unlink(missing_ok=True)
            list_of(whole).unlink(missing_ok=True)
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
                    list_of(path).unlink(missing_ok=True)
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


def _boot_id() -> str:
    """Return what is different after each start of this machine; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


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
