"""The on-chain program: C sources, and the built `coordinator.so` with its SHA-256."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from coordinator.jsonrpc import ChainError


class DamagedProgram(ChainError):
    """The packaged program is missing, or its bytes are not those that its recorded hash names."""


def program_bytes() -> bytes:
    """The built program (SBPF version 3), checked against its recorded SHA-256. Raises DamagedProgram."""
    folder = files(__name__)
    try:
        program = folder.joinpath("coordinator.so").read_bytes()
        recorded = folder.joinpath("coordinator.so.sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError) as error:
        raise DamagedProgram(f"coordinator.so or its recorded hash is missing ({error}); run `make program`") from error
    found = hashlib.sha256(program).hexdigest()
    if found != recorded:
        raise DamagedProgram(f"coordinator.so has SHA-256 {found}, recorded is {recorded}; run `make program`")
    return program
