"""What a blob is: pieces of 1 MiB, their digests, and the one digest that vouches for all of them.

A piece is the unit of transfer, verification and blame. A blob's digest is a BLAKE3 root over its length and the BLAKE3
digests of its pieces, so one digest from the chain vouches for every piece.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

PIECE_BYTES = 1 << 20
DIGEST_BYTES = 32
# A blob of more pieces keeps its list, so that serving it after a restart does not begin with reading all of it.
LONG_LIST = 256
ROOT_CONTEXT = "psyche-node 2026-11 blob root: u64 length, then the digests of its 1 MiB pieces"


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
    root = blake3(struct.pack("<Q", length), derive_key_context=ROOT_CONTEXT)
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

    @property
    def is_long(self) -> bool:
        """Whether its list is kept for as long as the blob is."""
        return len(self.pieces) > LONG_LIST

    @classmethod
    def of_file(cls, path: Path) -> Manifest:
        pieces = []
        length = 0
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                pieces.append(piece_digest(piece))
                length += len(piece)
        return cls(length, tuple(pieces))


def list_of(blob: Path) -> Path:
    """Return where the manifest of the blob in this file is kept."""
    return blob.with_name(f"{blob.name}.list")


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
