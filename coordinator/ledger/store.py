"""A ledger's folder: its genesis, its lock, snapshots and the log, and how a bank is brought back from them.

    genesis.json        format, the secret genesis bytes, the time of slot 0
    lock                held by the process that has the folder open
    snapshot-N          the state after N changes
    log-N               changes from number N on

Opening takes the newest snapshot and the changes after it. The snapshot before it and the log since then are kept, in
case the newest is damaged.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Self

from coordinator.ledger.bank import Bank
from coordinator.ledger.journal import sync_folder
from coordinator.ledger.logfile import LogFile, changes_of, log_files, log_number, read_log, vm_version
from coordinator.ledger.snapshot import Damaged, decode

log = logging.getLogger(__name__)

FORMAT: Final = 1
_SNAPSHOTS_KEPT: Final = 2
# A file that is being written; it gets its name when it is whole.
PART: Final = ".part"


class StoreError(Exception):
    """The folder cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Genesis:
    secret: bytes
    unix_time: int

    def bank(self) -> Bank:
        return Bank(self.secret, self.unix_time)


@dataclass(frozen=True, slots=True)
class Opened:
    """A bank as it was left, and where its log goes on: see `Journal` for the numbers."""

    bank: Bank
    index: int
    snapshot: int
    log_first: int
    log_size: int


class Store:
    """The folder of one ledger, locked while this object is open.

    Args:
        folder: is made if it does not exist (mode 0700: its genesis is secret).
        unix_time: seconds since the epoch, for a new ledger's slot 0.
        read_only: change nothing in the folder, which has to be a ledger's. Any number may be open like this at once.

    Raises:
        StoreError: in use, not a ledger's folder, or of another format.
    """

    def __init__(self, folder: Path, unix_time: int, *, read_only: bool = False) -> None:
        self.folder = folder
        self._read_only = read_only
        try:
            self._lock = self._open_lock()
        except OSError as error:
            if folder.is_file():
                raise StoreError(f"{folder} is a file. Name a folder with --dir; a new one is made") from None
            raise StoreError(f"{folder} cannot be used: {error.strerror}. Mend that, or choose another --dir") from None
        try:
            self._take_lock()
            if read_only:
                self.genesis = self._read_genesis()
                return
            self.genesis = self._read_genesis() if self._genesis_path.exists() else self._make_genesis(unix_time)
            for left in folder.glob("*" + PART):
                left.unlink()  # a snapshot that was being written when the process ended
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._read_only:
            os.ftruncate(self._lock, 0)  # whoever holds it next may be a reader, which leaves no number
        os.close(self._lock)

    def _open_lock(self) -> int:
        path = self.folder / "lock"
        if self._read_only:
            # A copy may come without it. Who holds nothing but this file is in nobody's way.
            return os.open(path if path.exists() else self._genesis_path, os.O_RDONLY | os.O_CLOEXEC)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 32).decode("ascii", "replace").strip()
            by = f"process {holder}" if holder else "`psyche-ledger check`"
            raise StoreError(f"{self.folder} is in use by {by}. Stop it first, or choose another --dir") from None
        if self._read_only:
            return
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    # ------------------------------------------------------------------ genesis

    @property
    def _genesis_path(self) -> Path:
        return self.folder / "genesis.json"

    def _make_genesis(self, unix_time: int) -> Genesis:
        strangers = [path.name for path in self.folder.iterdir() if path.name != "lock"]
        if any(not name.endswith(PART) for name in strangers):
            raise StoreError(
                f"{self.folder} has no genesis.json, but other files ({strangers[0]}). Choose an empty or new --dir; "
                "if this was a ledger's, restore its genesis.json from a copy"
            )
        genesis = Genesis(secrets.token_bytes(32), unix_time)
        shape = {"format": FORMAT, "genesis": genesis.secret.hex(), "unix_time": unix_time}
        write_durably(self._genesis_path, [json.dumps(shape).encode() + b"\n"])
        sync_folder(self.folder.parent)
        return genesis

    def _read_genesis(self) -> Genesis:
        try:
            shape = json.loads(self._genesis_path.read_bytes())
            if shape["format"] != FORMAT:
                raise StoreError(
                    f"{self._genesis_path} has format {shape['format']}, this version reads {FORMAT}. Use the version "
                    "that wrote it, or another --dir"
                )
            return Genesis(bytes.fromhex(shape["genesis"]), int(shape["unix_time"]))
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{self._genesis_path} is damaged. Restore it from a copy of the folder") from None

    # ------------------------------------------------------------------ opening

    def open(self) -> Opened:
        """The bank as it was left.

        Raises:
            StoreError: something that was acknowledged is damaged or missing.
        """
        bank, snapshot = self._newest_snapshot()
        index, last = snapshot, None
        for last in self._logs_since(snapshot):
            index = self._replay(bank, last, index)
        if last is None:
            return Opened(bank, index, snapshot, index, 0)
        if last.damage is not None:
            log.warning(
                "%s: its last %d bytes are a write that was interrupted; they are cut off, and nothing in them had "
                "been acknowledged",
                last.path.name,
                last.size - last.end,
            )
        if last.next < index:
            return Opened(bank, index, snapshot, index, 0)
        return Opened(bank, index, snapshot, last.first, last.end)

    def _newest_snapshot(self) -> tuple[Bank, int]:
        damaged: list[str] = []
        for number, path in reversed(self.snapshots()):
            bank = self.genesis.bank()
            try:
                bank.restore(decode(path.read_bytes()))
            except Damaged as error:
                log.warning("%s is damaged (%s): going back to the one before", path.name, error)
                damaged.append(path.name)
                continue
            return bank, number
        logs = log_files(self.folder)
        if damaged and (not logs or log_number(logs[0]) > 0):
            raise StoreError(
                f"no snapshot in {self.folder} can be read ({', '.join(damaged)}), and the log does not go back to the "
                "start. Restore the folder from a copy"
            )
        return self.genesis.bank(), 0

    def _logs_since(self, index: int) -> Iterator[LogFile]:
        """The log's files with changes from number `index` on, each checked, without a gap between them."""
        paths = log_files(self.folder)
        starts = [log_number(path) for path in paths]
        if starts and starts[0] > index:
            raise StoreError(
                f"changes {index} to {starts[0] - 1} are missing from {self.folder}. Restore the folder from a copy"
            )
        expected: int | None = None
        for position, path in enumerate(paths):
            is_last = position == len(paths) - 1
            if not is_last and starts[position + 1] <= index:
                continue  # all of it is in the snapshot
            if expected is not None and starts[position] != expected:
                raise StoreError(
                    f"changes {expected} to {starts[position] - 1} are missing from {self.folder}. Restore the folder "
                    "from a copy"
                )
            found = read_log(path)
            if found.damage is not None and not (is_last and found.torn):
                raise StoreError(
                    f"{self.folder}: {found.damage}, and it was acknowledged. Restore the folder from a copy. Without "
                    f"one, `psyche-ledger cut --dir {self.folder}` keeps everything before the damage and gives up "
                    "what came after it"
                )
            expected = found.next
            yield found

    def _replay(self, bank: Bank, found: LogFile, index: int) -> int:
        if found.vm != vm_version() and found.next > index:
            log.warning(
                "%s was written with solders %s and is replayed with %s: results may differ if the VM changed",
                found.path.name,
                found.vm,
                vm_version(),
            )
        for first, count, payload in found.frames:
            if first + count <= index:
                continue
            try:
                for number, change in enumerate(changes_of(payload), first):
                    if number >= index:
                        bank.apply(change)
            except ValueError as error:
                raise StoreError(f"{found.path}: changes {first} to {first + count - 1}: {error}") from error
            index = first + count
        return max(index, found.next)

    def replayed_from_genesis(self) -> Bank:
        """A new bank with every change from the first on. Needs a log that was kept whole.

        Raises:
            StoreError: the log does not go back to the start, or is damaged.
        """
        bank, index = self.genesis.bank(), 0
        for found in self._logs_since(0):
            index = self._replay(bank, found, index)
        return bank

    # ------------------------------------------------------------------ files

    def snapshots(self) -> list[tuple[int, Path]]:
        """(number of changes, file), oldest first."""
        paths = (path for path in self.folder.glob("snapshot-*") if path.name.rpartition("-")[2].isdecimal())
        return sorted((int(path.name.rpartition("-")[2]), path) for path in paths)

    def snapshot_path(self, index: int) -> Path:
        return self.folder / f"snapshot-{index:016d}"

    def drop_old(self, *, keep_log: bool) -> None:
        """Remove snapshots that are no longer needed, and the log before them unless it is to be kept."""
        snapshots = self.snapshots()
        for _, path in snapshots[:-_SNAPSHOTS_KEPT]:
            path.unlink()
        if keep_log or len(snapshots) < _SNAPSHOTS_KEPT:
            return
        oldest = snapshots[-_SNAPSHOTS_KEPT][0]
        for path, after in pairwise(log_files(self.folder)):
            if log_number(after) <= oldest:
                path.unlink()

    def cut(self) -> tuple[int, int] | None:
        """Give up everything from the first damage in the log on. Returns the number of changes kept and bytes cut.

        What is cut off stays in the folder, in files that end with .damaged. None: nothing was damaged.
        """
        _, snapshot = self._newest_snapshot()
        paths = log_files(self.folder)
        old = sum(1 for _, after in pairwise(paths) if log_number(after) <= snapshot)
        needed = paths[old:]
        for position, path in enumerate(needed):
            found = read_log(path)
            if found.damage is None:
                continue
            with path.open("rb") as file:
                file.seek(found.end)
                write_durably(path.with_name(path.name + ".damaged"), [file.read()])
            unreadable = [other for number, other in self.snapshots() if number > snapshot]
            for other in (*needed[position + 1 :], *unreadable):
                other.rename(other.with_name(other.name + ".damaged"))
            os.truncate(path, found.end)
            sync_folder(self.folder)
            return found.next, found.size - found.end
        return None


def write_durably(path: Path, parts: list[bytes]) -> None:
    """Write a whole file: it is there with all of its content, or not at all."""
    part = path.with_name(path.name + PART)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_folder(path.parent)
