"""The arithmetic of compiled code against this computer's: one C file, built for the virtual machine and for the host.

SBPF has instructions that compute something else than LLVM means; what it means is what the host computes. In the tests
thousands of inputs for every operation, by `make nightly` many more:

python tests/coordinator/program/arithmetic_check.py 1000000
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from program_harness import Chain, deploy
from solders.account import Account
from solders.compute_budget import set_compute_unit_limit
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from coordinator.layout import ROUND_SIZE
from coordinator.toolchain.build import PROGRAM_FOLDER, compile_objects
from coordinator.toolchain.linker import Arch, link

SOURCE = Path(__file__).resolve().parent / "arithmetic" / "operations.c"
NAMES = re.findall(r"^    X\((\w+),", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)
SEED = 20261130
BATCH = 64  # inputs in one transaction; all operations on each
HOST_FLAGS = ("-shared", "-fPIC", "-O1", "-std=c11", "-fno-strict-aliasing", "-fwrapv")
EDGES = np.array(
    [value % 2**64 for bits in (0, 7, 8, 15, 16, 31, 32, 33, 63, 64) for value in (2**bits - 1, 2**bits, 2**bits + 1)]
    + [-value % 2**64 for value in (2**7, 2**15, 2**31, 2**31 + 1)],
    dtype=np.uint64,
)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A result of the virtual machine that is not the host's."""

    operation: str
    arguments: tuple[int, int, int]
    machine: int
    host: int

    def __str__(self) -> str:
        a, b, c = self.arguments
        return f"{self.operation}(a={a:#x}, b={b:#x}, c={c:#x}) is {self.machine:#x} on chain, {self.host:#x} here"


def sources(folder: Path) -> Path:
    """The operations beside the program's headers, in a folder of their own, as the toolchain wants it."""
    shutil.copy(SOURCE, folder)
    for header in PROGRAM_FOLDER.glob("*.h"):
        shutil.copy(header, folder)
    return folder


def inputs(count: int, generator: np.random.Generator) -> NDArray[np.uint64]:
    """Triples: every value an edge, random, random of few bits, or close to the one beside it."""
    wide = generator.integers(0, 2**64, (count, 3), dtype=np.uint64)
    narrow = wide >> generator.integers(0, 64, (count, 3), dtype=np.uint64)
    near = np.roll(wide, 1, axis=1) + generator.integers(0, 3, (count, 3), dtype=np.uint64)
    edges = EDGES[generator.integers(0, len(EDGES), (count, 3))]
    signed = wide.astype(np.int32).astype(np.int64).astype(np.uint64)  # the upper half repeats bit 31
    kind = generator.integers(0, 6, (count, 3))
    return np.choose(kind, [wide, narrow, near, edges, edges, signed])


class Host:
    """The operations as a library of this computer."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = sources(Path(temporary))
            library = folder / "operations.so"
            command = [sys.executable, "-m", "ziglang", "cc", *HOST_FLAGS, SOURCE.name, "-o", library.name]
            subprocess.run(command, cwd=folder, check=True)
            self._run = ctypes.CDLL(str(library)).run_batch

    def run(self, batch: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(batch, len(batch))
        self._run(buffer)
        return buffer.raw


class Machine:
    """The operations as a program on a chain."""

    def __init__(self, arch: Arch = "v3") -> None:
        with tempfile.TemporaryDirectory() as temporary:
            program = link(compile_objects(sources(Path(temporary))), arch)
        self.chain = Chain()
        self.program = deploy(self.chain, program, key_seed=70)
        self.chain.advance()
        self.account = Pubkey(b"\x5a" * 32)

    def run(self, batch: bytes) -> bytes:
        self.chain.svm.set_account(self.account, Account(10**12, batch, self.program))
        call = Instruction(self.program, b"", [AccountMeta(self.account, is_signer=False, is_writable=True)])
        outcome = self.chain.send([set_compute_unit_limit(1_400_000), call])
        assert outcome.ok, outcome
        account = self.chain.svm.get_account(self.account)
        assert account is not None
        return bytes(account.data)


def compare(machine: Machine, host: Host, count: int, seed: int = SEED) -> list[Wrong]:
    """Try so many inputs (rounded up to whole batches) with every operation; return the first of each that is wrong."""
    generator = np.random.default_rng(seed)
    wrong: dict[str, Wrong] = {}
    for _ in range(-(-count // BATCH)):
        triples = inputs(BATCH, generator)
        results = bytes(8 * BATCH * len(NAMES))
        batch = BATCH.to_bytes(8, "little") + bytes(ROUND_SIZE) + triples.tobytes() + results
        got, meant = (
            np.frombuffer(side.run(batch)[-len(results) :], dtype="<u8").reshape(BATCH, len(NAMES))
            for side in (machine, host)
        )
        for row, column in np.argwhere(got != meant):
            a, b, c = (int(value) for value in triples[row])
            found = Wrong(NAMES[column], (a, b, c), int(got[row, column]), int(meant[row, column]))
            wrong.setdefault(found.operation, found)
    return list(wrong.values())


def main(arguments: list[str]) -> int:
    count, seed = (int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else SEED)
    host, failed = Host(), Counter[str]()
    for arch in ("v3", "v0"):
        for wrong in compare(Machine(arch), host, count, seed):
            failed[arch] += 1
            print(f"{arch}: {wrong}")
    print(f"{len(NAMES)} operations, {count} inputs, seed {seed}: {dict(failed) or 'all as on the host'}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
