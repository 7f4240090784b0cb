"""The whole program compiled for this computer: what it makes of an instruction is what the chain must make of it."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from program_harness import digest_of

from coordinator.toolchain.build import PROGRAM_FOLDER

SOURCE = Path(__file__).resolve().parent / "host" / "host.c"
FLAGS = ("-shared", "-fPIC", "-O1", "-std=c11", "-fno-strict-aliasing", "-fno-builtin", "-fvisibility=hidden")
GROWTH_ROOM = 10_240
CANARY = b"\xa5"
RENT = (3480, 0x4000000000000000, 50)  # lamports per byte and year, 2.0 years, percent


class _Slice(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_uint64))


_Hasher = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Slice), ctypes.c_uint64, ctypes.c_void_p)


class _Host(ctypes.Structure):
    _fields_ = (
        ("sha256", _Hasher),
        ("slot", ctypes.c_uint64),
        ("newest", ctypes.c_uint64 * 5),
        ("rent", ctypes.c_uint64 * 3),
    )


@_Hasher
def _sha256(parts, count, out):  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()
    for index in range(count):
        digest.update(ctypes.string_at(parts[index].data, parts[index].length))
    ctypes.memmove(out, digest.digest(), 32)


@dataclass(frozen=True, slots=True)
class Passed:
    """An account as the runtime hands it to a program."""

    key: bytes
    signs: bool
    written: bool
    owner: bytes
    lamports: int
    data: bytes


class HostProgram:
    """The program as a library."""

    def __init__(self, sources: Path = PROGRAM_FOLDER, flags: Sequence[str] = FLAGS) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for path in [*sources.glob("*.[ch]"), SOURCE]:
                shutil.copy(path, folder)
            library = folder / "program.so"
            names = sorted(path.name for path in folder.glob("*.c"))
            command = [sys.executable, "-m", "ziglang", "cc", *flags, *names, "-o", library.name]
            subprocess.run(command, cwd=folder, check=True)
            self._run = ctypes.CDLL(str(library)).host_run
        self._run.restype = ctypes.c_uint64
        self._host = _Host(sha256=_sha256, rent=RENT)

    def run(self, accounts: Sequence[Passed], data: bytes, program: bytes, slot: int) -> tuple[int, list[Passed]]:
        """The program's answer and the accounts as it leaves them. AssertionError when it wrote behind one of them."""
        raw, places = bytearray(len(accounts).to_bytes(8, "little")), []
        first: dict[bytes, int] = {}
        for index, account in enumerate(accounts):
            if account.key in first:
                raw += bytes([first[account.key]]) + bytes(7)
                places.append(places[first[account.key]])
                continue
            first[account.key] = index
            raw += bytes([0xFF, account.signs, account.written]) + bytes(5) + account.key + account.owner
            places.append(len(raw))
            size = len(account.data)
            raw += account.lamports.to_bytes(8, "little") + size.to_bytes(8, "little") + account.data
            raw += CANARY * (GROWTH_ROOM + -size % 8) + bytes(8)
        raw += len(data).to_bytes(8, "little") + data + program
        newest = (slot - 1).to_bytes(8, "little") + digest_of("slot", slot - 1)
        self._host.slot = slot
        ctypes.memmove(self._host.newest, newest, 40)
        buffer = (ctypes.c_char * len(raw)).from_buffer(raw)
        code = self._run(ctypes.byref(self._host), buffer)
        del buffer
        after = []
        for at, account in zip(places, accounts, strict=True):
            size = len(account.data)
            behind = raw[at + 16 + size : at + 16 + size + GROWTH_ROOM]
            assert behind == CANARY * GROWTH_ROOM, "the program wrote behind the end of an account"
            lamports = int.from_bytes(raw[at : at + 8], "little")
            kept = bytes(raw[at + 16 : at + 16 + size])
            after.append(Passed(account.key, account.signs, account.written, account.owner, lamports, kept))
        return code, after
