"""Builds the on-chain program: `python -m coordinator.toolchain.build [--check]`.

Compiles `coordinator/program/*.c` with the clang that the `ziglang` package carries, links with the project's own
linker, and writes `coordinator.so` (SBPF version 3) with its SHA-256 beside it. The bytes do not depend on where the
tree is checked out.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from coordinator.toolchain.linker import Arch, LinkError, link

PROGRAM_FOLDER: Final = Path(__file__).resolve().parent.parent / "program"
PROGRAM: Final = PROGRAM_FOLDER / "coordinator.so"

# -mcpu=v2 is not a choice: with 32-bit instructions LLVM assumes zero extension where the machine extends the sign.
FLAGS: Final = (
    *("-target", "bpfel-freestanding", "-mcpu=v2", "-Os", "-std=c11", "-g0", "-Wall", "-Wextra", "-Werror"),
    *(
        "-ffreestanding",
        "-fno-builtin",
        "-nostdinc",
        "-fno-jump-tables",
        "-fno-pic",
        "-fno-strict-aliasing",
        "-fno-unroll-loops",
    ),
    *("-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-stack-protector", "-fno-ident"),
    *("-mllvm", "-bpf-stack-size=4096", "-Xclang", "-target-feature", "-Xclang", "+allows-misaligned-mem-access"),
)


class BuildError(Exception):
    """The program could not be built; carries the compiler's output."""


def compile_objects(sources: Path = PROGRAM_FOLDER, work: Path | None = None) -> list[tuple[str, bytes]]:
    """Compile every .c file of a folder, in name order, to (name, object bytes). Raises BuildError."""
    names = sorted(path.name for path in sources.glob("*.c"))
    if not names:
        raise BuildError(f"no C sources in {sources}; is the package complete?")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        objects = []
        for name in names:
            output = Path(folder) / f"{name[:-2]}.o"
            # Run in the source folder with bare names, so that no path of this machine reaches the object.
            command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, "-c", name, "-o", str(output)]
            result = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                hint = "; install ziglang (pip install -e '.[dev]')" if "No module named" in result.stderr else ""
                raise BuildError(f"compiling {name} failed{hint}:\n{result.stderr.strip()}")
            objects.append((output.name, output.read_bytes()))
        return objects


def build(arch: Arch = "v3", sources: Path = PROGRAM_FOLDER) -> bytes:
    """The program's bytes. Raises BuildError."""
    try:
        return link(compile_objects(sources), arch)
    except LinkError as error:
        raise BuildError(f"linking failed: {error}") from error


def recorded_hash() -> str:
    """The checked-in SHA-256 of the checked-in program, in hex."""
    return Path(f"{PROGRAM}.sha256").read_text(encoding="ascii").split()[0]


def main(arguments: list[str] | None = None) -> int:
    """Command line. Exit status 0: built, or the check found the same bytes; 1: it did not; 2: the build failed."""
    parser = argparse.ArgumentParser(prog="python -m coordinator.toolchain.build", description=__doc__)
    parser.add_argument("--check", action="store_true", help="build to memory and compare with the checked-in program")
    parser.add_argument("--arch", choices=("v3", "v0"), default="v3", help="SBPF version of the output")
    parser.add_argument("--output", type=Path, default=PROGRAM, help="where to write the program")
    options = parser.parse_args(arguments)
    try:
        program = build(options.arch)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    digest = hashlib.sha256(program).hexdigest()
    if options.check:
        same = PROGRAM.read_bytes() == program and recorded_hash() == digest
        print(f"{digest}  {'identical to' if same else 'DIFFERS FROM'} {PROGRAM.name} ({recorded_hash()})")
        return 0 if same else 1
    options.output.write_bytes(program)
    Path(f"{options.output}.sha256").write_text(f"{digest}  {options.output.name}\n", encoding="ascii")
    print(f"{digest}  {options.output} ({len(program)} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
