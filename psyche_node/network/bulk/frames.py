"""What travels inside TLS on a bulk connection. Requests one way, and for each, in order, frames the other way.

    request      u32 length (at most 1024), a serialized FetchRequest
    piece        u32 length (1 to 2^20), the bytes of one piece
    end          u32 0, u8 status, u8 length, a reason in UTF-8 of that length

Numbers are big-endian. An end follows the last piece of each request, whatever became of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.sending import Status

ALPN = "psyche-bulk/1"
MAX_REQUEST = 1024
MAX_REASON = 255
LENGTH = struct.Struct(">I")
_END = struct.Struct(">BB")


class BadFrame(Exception):
    """The other side does not keep to the protocol; the message says in what."""


class Source(Protocol):
    """Where bytes come from."""

    def fill(self, view: memoryview) -> None:
        """Read exactly as many bytes as ``view`` has. Raises Broken when there will not be as many."""


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended. ``status`` may be a number that this version does not know."""

    status: int
    reason: str


def request_frame(request: bytes) -> bytes:
    return LENGTH.pack(len(request)) + request


def piece_header(piece: bytes) -> bytes:
    return LENGTH.pack(len(piece))


def end_frame(status: Status, reason: str = "") -> bytes:
    """``reason`` is cut to 255 bytes."""
    text = reason.encode()[:MAX_REASON].decode(errors="ignore").encode()
    return LENGTH.pack(0) + _END.pack(status, len(text)) + text


def read_request(source: Source) -> bytes:
    """Return the next request as bytes. Raises BadFrame."""
    (length,) = LENGTH.unpack(_take(source, LENGTH.size))
    if not 1 <= length <= MAX_REQUEST:
        raise BadFrame(f"a request of {length} bytes; 1 to {MAX_REQUEST} are read")
    return _take(source, length)


def read_frame(source: Source, buffer: memoryview) -> memoryview | End:
    """Read a piece into ``buffer``, of 1 MiB, and return that part of it, or return an end. Raises BadFrame."""
    (length,) = LENGTH.unpack(_take(source, LENGTH.size))
    if length > PIECE_BYTES:
        raise BadFrame(f"a piece of {length} bytes; at most {PIECE_BYTES} are read")
    if length:
        piece = buffer[:length]
        source.fill(piece)
        return piece
    status, size = _END.unpack(_take(source, _END.size))
    return End(status, _take(source, size).decode(errors="replace"))


def _take(source: Source, count: int) -> bytes:
    buffer = bytearray(count)
    if count:
        source.fill(memoryview(buffer))
    return bytes(buffer)
