"""The method Push: a node that nobody can fetch from sends its blob to a few public members, who serve it on.

The receiver takes what it looks for, and what the caller itself has announced as its update, within limits. Nothing is
taken on trust: the digests of the pieces must lead to the blob's digest, and each piece to its own, or the sender is
banned. What does not arrive whole leaves nothing behind.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError

from psyche_node.network.announcements import Announcements
from psyche_node.network.assembly import Assembly
from psyche_node.network.blobs import (
    DIGEST_BYTES,
    PIECE_BYTES,
    Manifest,
    StoreError,
    piece_count,
    piece_digest,
    piece_length,
)
from psyche_node.network.cap import Cap
from psyche_node.network.directory import Directory
from psyche_node.network.guard import MAX_DEADLINE_SECONDS, STREAM_SECONDS, Context
from psyche_node.network.messages import Why
from psyche_node.network.reader import Reader
from psyche_node.network.reports import Reporter, Traffic
from psyche_node.network.service import SERVICE
from psyche_node.network.store import BlobStore
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
# Below the largest request that a server takes.
PART_BYTES = 60 * 1024
MAX_PUSHES = 8
# Of them, those of blobs that nobody asked this node for yet: these must not keep out what it waits for.
MAX_UNASKED_PUSHES = 2
MAX_HEADER_BYTES = 128
HEADER_SECONDS = 5.0
MIN_BYTES_PER_SECOND = 128 * 1024
# What was announced and nobody asked this node for yet: bounds for one blob, and for all of them together.
MAX_UNASKED_BYTES = 256 << 20
MAX_UNASKED_TOTAL = 1 << 30


def push_seconds(length: int) -> float:
    """Return the deadline of a push of ``length`` bytes: the slowest that is taken."""
    return min(0.9 * MAX_DEADLINE_SECONDS, HEADER_SECONDS + math.ceil(length / MIN_BYTES_PER_SECOND))


def parts_of(round: int, digest: bytes, reader: Reader) -> Iterator[bytes]:
    """Yield the messages of a push. Raises StoreError when the blob is not there (any more)."""
    manifest = reader.manifest(digest)
    if manifest is None:
        raise StoreError(f"blob {digest.hex()[:16]} is not in the store")
    yield wire.PushHeader(round=round, digest=digest, length=manifest.length).SerializeToString()
    if len(manifest.pieces) > 1:
        yield from _cut(b"".join(manifest.pieces))
    for piece in reader.pieces(digest, range(len(manifest.pieces))):
        yield from _cut(piece)


def _cut(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), PART_BYTES):
        yield data[at : at + PART_BYTES]


class Wants(Protocol):
    """What this node looks for: ``Fetcher``. Any thread."""

    def wanted(self, round: int, digest: bytes) -> int | None:
        """Return the length in bytes of a blob with an open want, or None."""


class PushReceiver:
    """Answers Push. Any thread."""

    def __init__(
        self,
        store: BlobStore,
        reader: Reader,
        directory: Directory,
        announcements: Announcements,
        wants: Wants,
        reporter: Reporter,
        traffic: Traffic,
        arrived: Callable[[bytes, bytes], None],
    ) -> None:
        """``arrived(digest, sender)`` is called, in a thread, when a pushed blob is in the store."""
        self._store, self._reader, self._directory = store, reader, directory
        self._announcements, self._wants = announcements, wants
        self._reporter, self._traffic, self._arrived = reporter, traffic, arrived
        self._places = Cap(MAX_PUSHES, 1)
        self._unasked_places = Cap(MAX_UNASKED_PUSHES, 1)
        self._lock = threading.Lock()
        self._unasked: dict[bytes, tuple[int, int]] = {}

    def handlers(self) -> Any:
        methods = {"Push": grpc.stream_unary_rpc_method_handler(self.receive)}
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def forget(self, before_round: int) -> None:
        with self._lock:
            self._unasked = {digest: one for digest, one in self._unasked.items() if one[0] >= before_round}

    def asked(self, digests: list[bytes]) -> None:
        """This node looks for these blobs now, so they do not count as unasked any more."""
        with self._lock:
            for digest in digests:
                self._unasked.pop(digest, None)

    def receive(self, caller: bytes, parts: Iterator[bytes], context: Context) -> bytes:
        if self._directory.banned(caller):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "nothing is taken from this node any more")
        if not self._places.enter(caller):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many pushes at the same time; ask another node")
        incoming = _Incoming(parts, context, lambda count: self._traffic.received(caller, count, blob=True))
        header = wire.PushHeader()
        unasked = False
        try:
            header = self._header(incoming, context)
            unasked = self._admit(caller, header, context)
            incoming.expect(push_seconds(header.length))
            self._take(caller, header, incoming, context)
        except StoreError as error:
            log.error("a pushed blob could not be written: %s", error)
            context.abort(grpc.StatusCode.UNAVAILABLE, "this node's store failed")
        finally:
            incoming.done()
            self._places.leave(caller)
            if unasked:
                self._unasked_places.leave(caller)
                if not self._reader.holds(header.digest):
                    with self._lock:
                        self._unasked.pop(header.digest, None)
        self._arrived(header.digest, caller)
        return wire.PushReply().SerializeToString()

    def _header(self, incoming: _Incoming, context: Context) -> wire.PushHeader:
        raw = incoming.message()
        header = wire.PushHeader()
        try:
            if len(raw) > MAX_HEADER_BYTES:
                raise DecodeError("too long")
            header.ParseFromString(raw)
        except DecodeError:
            _bad(context, "the first message is not a PushHeader")
        if len(header.digest) != DIGEST_BYTES or not header.length:
            _bad(context, f"a digest is {DIGEST_BYTES} bytes, and a blob not empty")
        return header

    def _admit(self, caller: bytes, header: wire.PushHeader, context: Context) -> bool:
        """End the call unless the blob is to be taken. Returns whether it counts as one that nobody asked for."""
        if self._reader.holds(header.digest):
            context.abort(grpc.StatusCode.ALREADY_EXISTS, "this node holds it")
        wanted = self._wants.wanted(header.round, header.digest)
        if wanted is not None:
            if wanted != header.length:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{wanted} bytes are looked for")
            return False
        said = self._announcements.of(header.round, caller)
        if said is None or (said.digest, said.length) != (header.digest, header.length):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not looked for, and not announced by the caller")
        with self._lock:
            total = sum(length for _, length in self._unasked.values())
            room = header.length <= MAX_UNASKED_BYTES and total + header.length <= MAX_UNASKED_TOTAL
            if room := room and self._unasked_places.enter(caller):
                self._unasked[header.digest] = (header.round, header.length)
        if not room:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much that this node does not look for yet")
        return True

    def _take(self, caller: bytes, header: wire.PushHeader, incoming: _Incoming, context: Context) -> None:
        count = piece_count(header.length)
        first: bytes | None = None
        if count == 1:
            first = incoming.read(header.length)
            manifest = Manifest(header.length, (piece_digest(first),))
        else:
            raw = incoming.read(count * DIGEST_BYTES)
            digests = tuple(raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES))
            manifest = Manifest(header.length, digests)
        if manifest.digest != header.digest:
            self._ban(caller, header, "piece" if count == 1 else "manifest", context)
        assembly = self._store.begin(manifest, header.round)
        try:
            for index in range(count):
                piece = first if first is not None else incoming.read(piece_length(header.length, index))
                if not assembly.write(index, piece):
                    self._ban(caller, header, "piece", context)
            self._finish(assembly, incoming, context)
        finally:
            assembly.abandon()
        self._reader.remember(header.digest, manifest)

    def _finish(self, assembly: Assembly, incoming: _Incoming, context: Context) -> None:
        if not incoming.ended():
            _bad(context, "there is more than the header says")
        assembly.finish()

    def _ban(self, caller: bytes, header: wire.PushHeader, what: str, context: Context) -> NoReturn:
        self._directory.ban(caller)
        reason = f"it pushed another {what} than was committed to (round {header.round}, {header.digest.hex()[:16]})"
        text = f"{reason}; it is banned for the rest of the run"
        self._reporter.rejected(what, caller, text, Why.WRONG_BYTES, always=True)
        _bad(context, f"not the {what} of that blob")


class _Incoming:
    """The messages of one push as a stream of bytes, with time limits that end the call: in all, and for each MiB."""

    def __init__(self, parts: Iterator[bytes], context: Context, received: Callable[[int], None]) -> None:
        self._parts, self._context, self._received = parts, context, received
        self._left = b""
        self._moved = 0
        self._end = self._due = time.monotonic() + HEADER_SECONDS
        self._lock = threading.Lock()
        self._over = False
        self._watch()

    def expect(self, seconds: float) -> None:
        """Give the rest this long."""
        self._end = time.monotonic() + seconds
        self._moves()

    def done(self) -> None:
        with self._lock:
            self._over = True
            self._timer.cancel()

    def message(self) -> bytes:
        """Return the next message. Ends the call when there is none."""
        part = next(self._parts, None)
        if part is None:
            _bad(self._context, "the stream ended early")
        assert part is not None
        self._received(len(part))
        self._moved += len(part)
        if self._moved >= PIECE_BYTES:
            self._moves()
        return part

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes, at most some MiB. Ends the call when there are fewer."""
        chunks = []
        while count:
            if not self._left:
                self._left = self.message()
            chunk, self._left = self._left[:count], self._left[count:]
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)

    def ended(self) -> bool:
        """Return whether nothing is left. Waits for the sender's word."""
        return not self._left and next(self._parts, None) is None

    def _moves(self) -> None:
        self._moved = 0
        self._due = min(self._end, time.monotonic() + STREAM_SECONDS)

    def _watch(self) -> None:
        """End the call when it is overdue, and otherwise look again when it would be."""
        # A sender that stops would otherwise hold one of the few places until its own deadline.
        left = self._due - time.monotonic()
        if left <= 0:
            self._context.cancel()
            return
        with self._lock:
            if not self._over:
                self._timer = threading.Timer(left, self._watch)
                self._timer.daemon = True
                self._timer.start()


def _bad(context: Context, reason: str) -> NoReturn:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
    raise AssertionError("abort returned")
