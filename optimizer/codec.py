"""The bytes of an update: a header and, per block, a fixed-length code with exactly one valid form. numpy only.

Header, 96 bytes, little-endian::

    magic "PSYU" 4 | version u16 | topk u16 | length u64 | round u64 | member u32 | zero u32 | run 32 | layout digest 32

Body: `layout.blocks` times `layout.code.bytes` bytes. A block is a string of bits, least significant bit of a byte
first: topk x `low` low bits of the indices; a bitmap of topk + 4096 / 2^low bits, in which bit (index >> low) + i is
set for the i-th index (Elias 1974, Fano 1971); topk sign bits, 1 for negative; zeros to the end of the byte.
Blocks are coded by the compiled kernels where they are built, else by `plain_codec`, to the same bytes.
Shapes: N blocks, K coefficients per block (topk), B bytes per block.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer import native, plain_codec
from optimizer.errors import MalformedUpdate
from optimizer.layout import HEADER_BYTES, BlockCode, Layout
from optimizer.plain_codec import Indices, Numbers, Signs

MAGIC = b"PSYU"
VERSION = 1
_HEADER = struct.Struct("<4sHHQQII32s32s")
_SLAB = 2048  # blocks worked on at a time: about 30 MB of scratch at topk 512

Blob = bytes | bytearray | memoryview
assert _HEADER.size == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Header:
    """Who made an update, and for which round (u64) of which run (32 bytes)."""

    run: bytes
    round: int
    member: int


@dataclass(frozen=True, slots=True)
class Update:
    """One member's votes for one round.

    `indices` (N, K) uint16: coefficients of each block, strictly ascending. `signs` (N, K) bool: True is negative.
    """

    run: bytes
    round: int
    member: int
    indices: Indices
    signs: Signs

    @property
    def header(self) -> Header:
        return Header(self.run, self.round, self.member)


def encode(update: Update, layout: Layout) -> bytes:
    """The one encoding of `update`, `layout.update_bytes` long. Raises ValueError if it does not fit the layout."""
    shape = (layout.blocks, layout.topk)
    for name, array, kind in (("indices", update.indices, np.uint16), ("signs", update.signs, np.bool_)):
        if array.shape != shape or array.dtype != kind:
            raise ValueError(
                f"{name} are {array.dtype} of shape {array.shape}; the layout needs {np.dtype(kind)} {shape}"
            )
    body = np.empty((layout.blocks, layout.code.bytes), np.uint8)
    for rows in _slabs(layout.blocks):
        body[rows] = encode_blocks(update.indices[rows], update.signs[rows], layout.code)
    return encode_header(update.header, layout) + body.tobytes()


def decode(blob: Blob, layout: Layout) -> Update:
    """Read an update from untrusted bytes. Raises MalformedUpdate unless they are what `encode` makes of the result.

    The length is checked first, so time and memory are bounded by the layout, not by the sender. Compare run, round and
    member of the result with those expected.
    """
    header, body = open_body(blob, layout)
    indices = np.empty((layout.blocks, layout.topk), np.uint16)
    signs = np.empty((layout.blocks, layout.topk), np.bool_)
    for rows in _slabs(layout.blocks):
        indices[rows], signs[rows] = decode_blocks(body[rows], layout.code, range(rows.start, rows.stop))
    return Update(header.run, header.round, header.member, indices, signs)


def validate(blob: Blob, layout: Layout) -> Header:
    """The same checks as `decode`, keeping nothing but the header: memory does not grow with the model."""
    header, body = open_body(blob, layout)
    for rows in _slabs(layout.blocks):
        check_blocks(body[rows], layout.code, range(rows.start, rows.stop))
    return header


def encode_header(header: Header, layout: Layout) -> bytes:
    """The 96 bytes in front of the body. Raises ValueError unless the run id is 32 bytes and the numbers fit."""
    if not isinstance(header.run, bytes) or len(header.run) != 32:
        raise ValueError(f"the run is identified by 32 bytes, not by {header.run!r:.50}")
    fields = (layout.topk, layout.update_bytes, header.round, header.member, 0, header.run, layout.digest)
    try:
        return _HEADER.pack(MAGIC, VERSION, *fields)
    except struct.error as error:
        raise ValueError(f"round {header.round} or member {header.member} does not fit the header: {error}") from error


def open_body(blob: Blob, layout: Layout) -> tuple[Header, NDArray[np.uint8]]:
    """Check length and header; return the header and the body (N, B) uint8, a view without a copy."""
    view = memoryview(blob).cast("B")
    if len(view) != layout.update_bytes:
        raise MalformedUpdate(
            f"it has {len(view)} bytes; an update of this layout has {layout.update_bytes} (do model and topk agree?)"
        )
    magic, version, topk, length, number, member, zero, run, digest = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise MalformedUpdate(f"it begins with {magic!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise MalformedUpdate(f"its version is {version}; this release reads version {VERSION}")
    if topk != layout.topk:
        raise MalformedUpdate(f"its topk is {topk}; this run has {layout.topk}")
    if length != layout.update_bytes:
        raise MalformedUpdate(f"its header says {length} bytes; it has {layout.update_bytes}")
    if zero != 0:
        raise MalformedUpdate("the reserved bytes of its header are not zero")
    if digest != layout.digest:
        raise MalformedUpdate(f"it is of layout {digest.hex()[:16]}…; this run has {layout.digest.hex()[:16]}…")
    body = np.frombuffer(view, np.uint8, offset=HEADER_BYTES).reshape(layout.blocks, layout.code.bytes)
    return Header(run, number, member), body


def encode_blocks(indices: Indices, signs: Signs, code: BlockCode) -> NDArray[np.uint8]:
    """Code of N blocks (N, B) uint8. Raises ValueError unless indices are below 4096 and strictly ascending."""
    if native.available():
        return native.kernels().encode_blocks(np.ascontiguousarray(indices), np.ascontiguousarray(signs), code)
    return plain_codec.encode_blocks(indices, signs, code)


def decode_blocks(body: NDArray[np.uint8], code: BlockCode, numbers: Numbers) -> tuple[Indices, Signs]:
    """Indices and signs (N, K) of N blocks (N, B), called `numbers` in messages.

    Raises MalformedUpdate, naming a block at fault, for anything `encode_blocks` would not have made.
    """
    decoded = native.kernels().decode(np.ascontiguousarray(body), code) if native.available() else None
    return decoded or plain_codec.decode_blocks(body, code, numbers)


def check_blocks(body: NDArray[np.uint8], code: BlockCode, numbers: Numbers) -> None:
    """Raise what `decode_blocks` raises."""
    if not (native.available() and native.kernels().valid(body, code)):
        plain_codec.decode_blocks(body, code, numbers)


def _slabs(blocks: int) -> Iterator[slice]:
    for start in range(0, blocks, _SLAB):
        yield slice(start, min(start + _SLAB, blocks))
