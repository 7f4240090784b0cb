"""The write-ahead log's files: frames of changes with checksums, written whole and read back whole.

File `log-N`: a header line with the version of the VM, then frames. Frame: magic, length of the payload, number of the
first change, count of changes, CRC-32 over all of these and the payload; then the payload. A frame is one group commit:
only the last one of the last file can have been interrupted, because the next is written after it is durable.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from coordinator.ledger.bank import AdvanceSlot, Change, Execute
from coordinator.ledger.snapshot import Damaged

_HEADER: Final = "psyche-ledger log 1, solders {}\n"
_FRAME_MAGIC: Final = b"\xf5PsL"
_FRAME: Final = struct.Struct("<4sIQII")
_ADVANCE: Final = struct.Struct("<BQq")
_EXECUTE: Final = struct.Struct("<BH")
_KIND_ADVANCE: Final = 1
_KIND_EXECUTE: Final = 2
_SECTOR: Final = 512


def vm_version() -> str:
    """Of the package that holds the VM. Replay is exact only with the one that the changes were executed by."""
    return version("solders")


def header() -> bytes:
    return _HEADER.format(vm_version()).encode()


def change_bytes(change: Change) -> bytes:
    if isinstance(change, AdvanceSlot):
        return _ADVANCE.pack(_KIND_ADVANCE, change.slot, change.unix_time)
    return _EXECUTE.pack(_KIND_EXECUTE, len(change.transaction)) + change.transaction


def frame(first: int, count: int, payload: bytes) -> bytes:
    """One group commit: `count` changes, of which the first is number `first` since the genesis."""
    return _FRAME.pack(_FRAME_MAGIC, len(payload), first, count, _crc(first, count, payload)) + payload


def _crc(first: int, count: int, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<IQI", len(payload), first, count)))


def changes_of(payload: bytes) -> Iterator[Change]:
    at = 0
    while at < len(payload):
        if payload[at] == _KIND_ADVANCE:
            _, slot, unix_time = _ADVANCE.unpack_from(payload, at)
            at += _ADVANCE.size
            yield AdvanceSlot(slot, unix_time)
        elif payload[at] == _KIND_EXECUTE:
            _, length = _EXECUTE.unpack_from(payload, at)
            at += _EXECUTE.size + length
            yield Execute(payload[at - length : at])
        else:
            raise Damaged(f"a change of unknown kind {payload[at]}: written by another version?")


@dataclass(slots=True)
class LogFile:
    """One file of the log, read and checked up to its end or its first damage.

    `end` is the byte after the last whole frame. `damage` says what is there instead of a next one; None at the end of
    the file. `torn`: it can be a write that was interrupted, of which nothing was acknowledged.
    """

    path: Path
    first: int
    vm: str
    frames: list[tuple[int, int, bytes]]
    end: int
    size: int
    damage: str | None = None
    torn: bool = False

    @property
    def next(self) -> int:
        """The number of the change after its last one."""
        return self.frames[-1][0] + self.frames[-1][1] if self.frames else self.first


def read_log(path: Path) -> LogFile:
    """Read a file of the log and check every frame. Does not raise for damage: see `LogFile`."""
    content = path.read_bytes()
    start = content.find(b"\n") + 1
    known, _, vm = content[:start].decode("latin-1").rstrip("\n").rpartition(" ")
    found = LogFile(path, log_number(path), vm, [], start, len(content))
    if not start or known + " " != _HEADER.partition("{")[0]:
        found.vm, found.end = vm_version(), 0
        found.damage = f"{path.name} does not start as a log of this version"
        # The file had just been begun, and the process ended before its first line was written.
        # Where that line was to be there may be zeros: space whose data never arrived.
        found.torn = len(content) <= len(header()) and header().startswith(content.rstrip(b"\0"))
        return found
    while found.end < len(content):
        one = _read_frame(content, found.end, found.next)
        if one is None:
            found.damage = (
                f"{path.name}: change {found.next}, at byte {found.end} of {len(content)}, is damaged: its checksum "
                "does not match"
            )
            found.torn = _is_torn(content, found.end, found.next)
            break
        found.frames.append(one)
        found.end += _FRAME.size + len(one[2])
    return found


def _read_frame(content: bytes, at: int, expected: int | None) -> tuple[int, int, bytes] | None:
    """(first, count, payload) of the frame at a byte; None if there is no whole, undamaged one (with this number)."""
    if len(content) - at < _FRAME.size:
        return None
    magic, length, first, count, crc = _FRAME.unpack_from(content, at)
    start = at + _FRAME.size
    payload = content[start : start + length]
    if magic != _FRAME_MAGIC or len(payload) < length or _crc(first, count, payload) != crc:
        return None
    return None if expected is not None and first != expected else (first, count, payload)


def _is_torn(content: bytes, at: int, expected: int) -> bool:
    """Whether what is at this byte can be a write that was interrupted: it is the last, and parts of it are missing.

    Missing parts are an early end of the file, or whole sectors of zeros (space that the file system had set aside
    before the data was there).
    """
    later = content.find(_FRAME_MAGIC, _search_from(content, at, expected))
    while later >= 0:
        one = _read_frame(content, later, None)
        if one is not None and one[0] > expected:
            return False
        later = content.find(_FRAME_MAGIC, later + 1)
    if len(content) - at < _FRAME.size:
        return True
    magic, length, *_ = _FRAME.unpack_from(content, at)
    if magic == _FRAME_MAGIC and at + _FRAME.size + length > len(content):
        return True
    sectors = range(at - at % _SECTOR, len(content), _SECTOR)
    return any(_all_zero(content[max(sector, at) : sector + _SECTOR]) for sector in sectors)


def _search_from(content: bytes, at: int, expected: int) -> int:
    """The byte from which on a later frame may be, given that the one at `at` is not whole.

    Clients choose the bytes of their transactions, so what looks like a frame inside of one is none. Change by change
    from the frame's header on, as far as they are in order: the length in the header may be what is damaged.
    """
    if len(content) - at < _FRAME.size:
        return at + 1
    magic, length, first, *_ = _FRAME.unpack_from(content, at)
    if magic != _FRAME_MAGIC or first != expected:
        return at + 1
    here: int = at + _FRAME.size
    end: int = here + length
    while here < min(end, len(content)):
        kind = content[here]
        if kind == _KIND_ADVANCE:
            here += _ADVANCE.size
        elif kind == _KIND_EXECUTE and here + _EXECUTE.size <= len(content):
            here += _EXECUTE.size + _EXECUTE.unpack_from(content, here)[1]
        elif not kind:
            return end  # sectors that never arrived: where the next change begins is not known
        else:
            break
    return here


def _all_zero(part: bytes) -> bool:
    return not any(part)


def log_number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def log_files(folder: Path) -> list[Path]:
    """The log's files, oldest first."""
    return sorted((path for path in folder.glob("log-*") if path.name[4:].isdecimal()), key=log_number)


def log_path(folder: Path, first: int) -> Path:
    return folder / f"log-{first:016d}"
