"""Wanted blobs: from the author, or from whoever holds them, until they are here or forgotten. Runs on trio.

Each want is a task. An attempt at a source is a thread with a deadline; when it is slow, a second source is asked at
the same time. A source whose bytes are wrong is banned, and the want goes on elsewhere.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements
from psyche_node.network.directory import Directory
from psyche_node.network.links import CallFailed, Cause, Links, Stream
from psyche_node.network.messages import Fetched, FetchFailed, Why
from psyche_node.network.reports import Reporter
from psyche_node.network.service import MAX_PIECES_PER_FETCH
from psyche_node.network.store import (
    DIGEST_BYTES,
    PIECE_BYTES,
    Assembly,
    BlobStore,
    Manifest,
    Reader,
    StoreError,
    piece_count,
    piece_digest,
)
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
CALL_SECONDS = 5.0
MIN_BYTES_PER_SECOND = 256 * 1024
# After this long without a result, a second source is asked at the same time.
HEDGE_SECONDS = 2.0
MAX_SOURCES = 2
MAX_THREADS = 12
ASK_EVERY = 1.0
ASK_PEERS = 3


class BadBytes(Exception):
    """A source sent bytes that are not the committed ones; it is banned."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(reason)
        self.what = what


@dataclass(eq=False)
class _Want:
    round: int
    member: int
    digest: bytes
    length: int
    holders: set[bytes] = field(default_factory=set)
    retry_at: dict[bytes, float] = field(default_factory=dict)
    failures: dict[bytes, int] = field(default_factory=dict)
    pushed_by: bytes | None = None
    told: set[str] = field(default_factory=set)
    running: dict[bytes, _Attempt] = field(default_factory=dict)
    news: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    assembly: Assembly | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        return f"round {self.round}, member {self.member}, {self.digest.hex()[:16]}"


class _Attempt:
    """One source being read in a thread; ``cancel`` ends it from outside."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self.cancelled = False

    def reading(self, stream: Stream) -> Stream:
        self._stream = stream
        if self.cancelled:
            stream.cancel()
        return stream

    def cancel(self) -> None:
        self.cancelled = True
        if self._stream is not None:
            self._stream.cancel()


class Fetcher:
    """The open wants of this node."""

    def __init__(
        self,
        store: BlobStore,
        reader: Reader,
        links: Links,
        directory: Directory,
        announcements: Announcements,
        reporter: Reporter,
        take_announcement: Callable[[bytes, bytes], object],
    ) -> None:
        self._store, self._reader, self._links, self._directory = store, reader, links, directory
        self._announcements, self._reporter, self._take = announcements, reporter, take_announcement
        self._wants: dict[tuple[int, bytes], _Want] = {}
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._asking = trio.CapacityLimiter(2 * ASK_PEERS)
        self._nursery: trio.Nursery | None = None
        self._ask_now = trio.Event()

    async def run(self) -> None:
        """Work on wants until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                await self._ask_now.wait()
                self._ask_now = trio.Event()
                # The author usually answers within this time, and then there is nothing to ask.
                await trio.sleep(ASK_EVERY / 4)
                while self._wants:
                    self._ask_around(nursery)
                    await trio.sleep(ASK_EVERY)

    def want(self, round: int, member: int, digest: bytes, length: int) -> None:
        """Open a want; one that is open already stays as it is."""
        if (round, digest) in self._wants or self._nursery is None:
            return
        want = self._wants[round, digest] = _Want(round, member, digest, length)
        self._nursery.start_soon(self._pursue, want)
        self._ask_now.set()

    def forget(self, before_round: int) -> None:
        for key, want in list(self._wants.items()):
            if want.round < before_round:
                del self._wants[key]
                want.scope.cancel()

    def announced(self, digest: bytes, holder: bytes) -> None:
        """Somebody says that it has a blob."""
        for want in self._wants.values():
            if want.digest == digest and holder not in want.holders:
                want.holders.add(holder)
                want.retry_at.pop(holder, None)
                want.news.set()

    def wanted(self, round: int, digest: bytes) -> int | None:
        """Return the length in bytes of a blob with an open want, or None. Any thread."""
        want = self._wants.get((round, digest))
        return None if want is None else want.length

    def arrived(self, digest: bytes, sender: bytes) -> None:
        """A blob was pushed into the store."""
        for want in self._wants.values():
            if want.digest == digest:
                want.pushed_by = sender
                want.news.set()

    def reachable(self, peer: bytes) -> None:
        """There is a way to a peer that could not be reached."""
        for want in self._wants.values():
            want.retry_at.pop(peer, None)
            want.news.set()

    def sources_changed(self) -> None:
        """Members or records changed."""
        for want in self._wants.values():
            want.news.set()

    async def _pursue(self, want: _Want) -> None:
        try:
            with want.scope:
                source = await self._find(want)
                self._reporter.emit(
                    Fetched(
                        round=want.round,
                        member=want.member,
                        digest=want.digest.hex(),
                        length=want.length,
                        source=node_id(source),
                    )
                )
        finally:
            for attempt in want.running.values():
                attempt.cancel()
            if want.assembly is not None:
                want.assembly.abandon()
            if self._wants.get((want.round, want.digest)) is want:
                del self._wants[want.round, want.digest]

    async def _find(self, want: _Want) -> bytes:
        found: list[bytes] = []
        async with trio.open_nursery() as attempts:
            while not found:
                if await self._is_here(want):
                    found.append(want.pushed_by or self._directory.own_key)
                    break
                want.news = trio.Event()
                if len(want.running) < MAX_SOURCES and (source := self._choose(want)) is not None:
                    want.running[source] = _Attempt()
                    attempts.start_soon(self._attempt, want, source, found)
                with trio.move_on_after(self._patience(want)):
                    await want.news.wait()
            attempts.cancel_scope.cancel()
        return found[0]

    async def _is_here(self, want: _Want) -> bool:
        # The supervisor, or another want of the same bytes, may have put it into the store.
        return not want.running and await in_thread(partial(self._reader.holds, want.digest))

    def _choose(self, want: _Want) -> bytes | None:
        now = trio.current_time()
        author = self._directory.key(want.member)
        free = [
            key
            for key in self._directory.sources(self._directory.others().values())
            if key not in want.running and want.retry_at.get(key, 0.0) <= now
        ]
        if not free:
            if not want.running and not self._directory.sources(self._directory.others().values()):
                self._tell(want, "no member that could serve it has an address yet")
            return None
        # The author first, then those who said that they have it, then anybody: the digest vouches for the bytes.
        return min(free, key=lambda key: (key != author, key not in want.holders, random.random()))

    def _patience(self, want: _Want) -> float:
        if want.running:
            return HEDGE_SECONDS
        now = trio.current_time()
        return min(max(min((at - now for at in want.retry_at.values()), default=1.0), 0.02), 1.0)

    async def _attempt(self, want: _Want, source: bytes, found: list[bytes]) -> None:
        attempt = want.running[source]
        backwards = len(want.running) > 1
        try:
            await in_thread(partial(self._download, want, source, attempt, backwards), self._threads)
            found.append(source)
        except BadBytes as error:
            self._ban(want, source, error)
        except CallFailed as error:
            self._back_off(want, source, error)
        except (StoreError, OSError) as error:
            log.error("%s could not be written: %s", want.name, error)
            self._tell(want, f"this node's store failed: {error}")
            want.retry_at[source] = trio.current_time() + 1.0
        finally:
            attempt.cancel()
            want.running.pop(source, None)
            want.news.set()

    def _ban(self, want: _Want, source: bytes, error: BadBytes) -> None:
        reason = f"{error} ({want.name}); it is banned as a source of blobs for the rest of the run"
        self._directory.ban(source)
        self._reporter.rejected(error.what, source, reason, Why.WRONG_BYTES, always=True)
        self._tell(want, f"{node_id(source)}: {error}")

    def _back_off(self, want: _Want, source: bytes, error: CallFailed) -> None:
        failures = want.failures[source] = want.failures.get(source, 0) + 1
        longest = 0.5 if error.cause is Cause.BUSY else 5.0
        wait = min(longest, 0.2 * 2.0 ** min(failures - 1, 8)) * random.uniform(0.8, 1.2)
        want.retry_at[source] = trio.current_time() + wait
        want.holders.discard(source)
        author = source == self._directory.key(want.member)
        # That somebody else does not hold it is no news.
        if author or error.cause is not Cause.MISSING:
            self._tell(want, f"{'its author' if author else 'another holder'} {node_id(source)}: {error}", error.cause)

    def _tell(self, want: _Want, reason: str, cause: str | None = None) -> None:
        if (cause or reason) not in want.told:
            want.told.add(cause or reason)
            self._reporter.emit(
                FetchFailed(round=want.round, member=want.member, digest=want.digest.hex(), reason=reason)
            )

    # In threads ------------------------------------------------------------------------------------------------------

    def _download(self, want: _Want, source: bytes, attempt: _Attempt, backwards: bool) -> Path:
        """Bring what is missing from one source and finish the blob. Raises CallFailed, BadBytes or StoreError."""
        if piece_count(want.length) == 1:
            return self._download_one(want, source, attempt)
        with want.lock:
            assembly = want.assembly
        if assembly is None:
            manifest = self._manifest(want, source)
            with want.lock:
                if want.assembly is None:
                    want.assembly = self._store.begin(manifest, want.round)
                assembly = want.assembly
        while (run := assembly.missing(MAX_PIECES_PER_FETCH, last=backwards))[1]:
            self._fetch_pieces(want, source, attempt, assembly, *run)
        with want.lock:
            self._reader.remember(want.digest, assembly.manifest)
            return assembly.finish()

    def _download_one(self, want: _Want, source: bytes, attempt: _Attempt) -> Path:
        # A blob of one piece needs no manifest: its length and its bytes give its digest.
        stream = attempt.reading(self._links.fetch(source, want.digest, 0, 1, _deadline(want.length)))
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if len(pieces) > 1 or len(piece) != want.length:
                raise BadBytes("piece", f"it sent {sum(map(len, pieces))} bytes, {want.length} are committed to")
        if not pieces:
            raise CallFailed(Cause.BROKEN, "it ended the stream without a piece")
        manifest = Manifest(want.length, (piece_digest(pieces[0]),))
        if manifest.digest != want.digest:
            raise BadBytes("piece", "its bytes are not those committed to")
        assembly = self._store.begin(manifest, want.round)
        try:
            assembly.write(0, pieces[0])
            self._reader.remember(want.digest, manifest)
            return assembly.finish()
        finally:
            assembly.abandon()

    def _manifest(self, want: _Want, source: bytes) -> Manifest:
        request = wire.ManifestRequest(digest=want.digest)
        reply = self._links.call(source, "GetManifest", request, wire.Manifest, CALL_SECONDS)
        if reply.length != want.length:
            raise BadBytes("manifest", f"it says {reply.length} bytes, {want.length} are committed to")
        pieces = reply.pieces
        manifest = Manifest(
            reply.length, tuple(pieces[at : at + DIGEST_BYTES] for at in range(0, len(pieces), DIGEST_BYTES))
        )
        if len(pieces) != piece_count(want.length) * DIGEST_BYTES or manifest.digest != want.digest:
            raise BadBytes("manifest", "its piece list is not the one committed to")
        return manifest

    def _fetch_pieces(
        self, want: _Want, source: bytes, attempt: _Attempt, assembly: Assembly, first: int, count: int
    ) -> None:
        if attempt.cancelled:
            raise CallFailed(Cause.SLOW, "cancelled")
        stream = attempt.reading(self._links.fetch(source, want.digest, first, count, _deadline(count * PIECE_BYTES)))
        arrived = 0
        for piece in stream:
            if arrived == count or not assembly.write(first + arrived, piece):
                stream.cancel()
                raise BadBytes("piece", f"its piece {first + arrived} is not the one committed to")
            arrived += 1
        if arrived < count:
            raise CallFailed(Cause.BROKEN, f"it ended the stream after {arrived} of {count} pieces")

    # Anti-entropy ----------------------------------------------------------------------------------------------------

    def _ask_around(self, nursery: trio.Nursery) -> None:
        """Ask a few random members what they know about the rounds with open wants."""
        peers = self._directory.sources(self._directory.others().values())
        for round in {want.round for want in self._wants.values()}:
            for peer in random.sample(peers, min(ASK_PEERS, len(peers))):
                nursery.start_soon(self._ask, peer, round)

    async def _ask(self, peer: bytes, round: int) -> None:
        wanted = {want.digest for want in self._wants.values() if want.round == round}
        if self._asking.available_tokens < 1 or not wanted:
            return
        request = wire.SinceRequest(round=round, have=self._announcements.bitmap(round), wanted=sorted(wanted)[:256])
        try:
            reply = await in_thread(
                partial(self._links.call, peer, "Since", request, wire.SinceReply, CALL_SECONDS), self._asking
            )
        except CallFailed as error:
            log.debug("asking %s about round %d failed: %s", node_id(peer), round, error)
            return
        for raw in reply.announcements:
            self._take(raw, peer)
        for digest in wanted.intersection(reply.held):
            self.announced(digest, peer)


def _deadline(length: int) -> float:
    return CALL_SECONDS + math.ceil(length / MIN_BYTES_PER_SECOND)
