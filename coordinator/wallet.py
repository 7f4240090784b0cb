"""Wallets: Solana keypair files, a JSON array of 64 bytes, as solana-keygen writes them."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from solders.keypair import Keypair

_MAX_FILE_BYTES: Final = 4096


class WalletError(Exception):
    """A wallet file that cannot be used; the message says why and what to do."""


def load_keypair(path: Path) -> Keypair:
    """Read a keypair file.

    Raises:
        WalletError: it is missing, others than its owner can read it, or it does not hold a keypair.
    """
    try:
        # Checked on the open file, so that it is the file that is read.
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise WalletError(f"wallet {path} is not a file; name the file that holds the keypair")
            if mode & 0o077:
                raise WalletError(
                    f"wallet {path} can be read by others (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
                )
            raw = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise WalletError(f"there is no wallet {path}; make one with: psyche-admin keys new {path}") from None
    except OSError as error:
        raise WalletError(
            f"wallet {path} cannot be read: {error.strerror or error}; give this user the right to read it"
        ) from error
    return _parse(raw, path)


def _parse(raw: bytes, path: Path) -> Keypair:
    problem = (
        f"wallet {path} is not a Solana keypair file (a JSON array of 64 bytes whose halves belong together); restore "
        "it from a backup"
    )
    try:
        values = json.loads(raw[:_MAX_FILE_BYTES])
        secret = bytes(values) if isinstance(values, list) else b""
    except (ValueError, TypeError, RecursionError):
        raise WalletError(problem) from None
    if len(secret) != 64:
        raise WalletError(problem)
    keypair = Keypair.from_seed(secret[:32])
    if bytes(keypair) != secret:
        raise WalletError(problem)
    return keypair


def create_keypair(path: Path) -> Keypair:
    """Make a new keypair and write it to a new file with mode 0600, durably.

    Raises:
        WalletError: the file exists, or cannot be written.
    """
    keypair = Keypair()
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        part = Path(name)
        with os.fdopen(descriptor, "w") as file:
            json.dump(list(bytes(keypair)), file)
            file.flush()
            os.fsync(file.fileno())
        # A link appears whole and never replaces: no half-written wallet, none overwritten, however many start at once.
        os.link(part, path)
    except FileExistsError:
        raise WalletError(f"wallet {path} exists already; choose another file, it will not be overwritten") from None
    except OSError as error:
        raise WalletError(
            f"wallet {path} cannot be written: {error.strerror or error}; name a place where it can be"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return keypair


def load_or_create_keypair(path: Path) -> Keypair:
    """The keypair in a file; where there is no file, a new one. Raises WalletError."""
    if not path.exists():
        try:
            return create_keypair(path)
        except WalletError:
            if not path.exists():
                raise
            # Another process made it between the two looks.
    return load_keypair(path)
