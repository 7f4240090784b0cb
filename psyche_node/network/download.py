"""One source of one wanted blob, read in a thread: manifest, runs of pieces, each verified before it is kept."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from psyche_node.network.blobs import DIGEST_BYTES, PIECE_BYTES, Manifest, piece_count, piece_digest, piece_length
from psyche_node.network.bulk.lanes import Lanes, Pieces
from psyche_node.network.guard import MAX_DEADLINE_SECONDS
from psyche_node.network.holdings import Holdings, Partial
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.messages import MAX_BLOB_BYTES, Kind
from psyche_node.network.pieces import Plan
from psyche_node.network.quality import Quality
from psyche_node.network.reader import Reader
from psyche_node.network.sending import KINDS, MAX_PIECES_PER_FETCH
from psyche_node.network.service import MAX_PIECES_PER_MANIFEST
from psyche_node.network.store import BlobStore
from psyche_node.network.wants import Choice, Want, is_slow
from psyche_node.network.wire import node_pb2 as wire

CALL_SECONDS = 5.0
# A deadline for what even a slow line brings; a source that sends nothing is given up much earlier, by the fetcher.
MIN_BYTES_PER_SECOND = 64 * 1024
LONGEST_CALL_SECONDS = 0.98 * MAX_DEADLINE_SECONDS
# A run is what a source brings in about this time, so that a slow one has little that others wait for. It begins with
# what is known of the source, and doubles or halves.
RUN_SECONDS = 1.0
SMALLEST_RUN = 4
# Besides the run that comes another one is asked for, or a long line would be idle for a round trip after each.
MAX_OPEN_RUNS = 3
# A source that takes no more calls is asked again after so long, and after longer the next time.
BUSY_SECONDS = 0.05
_WIRE_KINDS = {kind: number for number, kind in KINDS.items()}


class BadBytes(Exception):
    """A source sent bytes that are not the committed ones; it is banned."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(reason)
        self.what = what


class FalseCommitment(Exception):
    """No blob has both the digest and the length that were committed to: its digest is that of another length."""


class NothingYet(Exception):
    """A source that is still receiving the blob itself had no piece for this node in time."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What downloads work with."""

    store: BlobStore
    reader: Reader
    holdings: Holdings
    links: Links
    lanes: Lanes
    quality: Quality
    begun: Callable[[Want], None]
    """Told, in a download's thread, when the first piece of a blob of several is here."""
    hurry: Callable[[], bool]
    """Whether updates are being fetched, for which other blobs make room."""


@dataclass(slots=True)
class _Run:
    stream: Pieces
    pieces: range
    arrived: int = 0
    began: float = 0.0
    """When its first piece came."""


class Download:
    """One source of one want. ``run`` is for a thread; ``cancel`` ends it from any other."""

    def __init__(self, tools: Tools, want: Want, choice: Choice) -> None:
        self._tools, self._want, self._choice = tools, want, choice
        self._source = choice.source
        self._lane = tools.lanes.lane(choice.source, want.length)
        tools.lanes.prepare(choice.source, want.length)
        self._open: deque[_Run] = deque()
        expected = int(tools.quality.speed(choice.source) * RUN_SECONDS / PIECE_BYTES)
        self._limit = min(max(expected, SMALLEST_RUN), MAX_PIECES_PER_FETCH)
        self._lock = threading.Lock()
        self._cancelled = False
        self._gave_up: str | None = None
        self._dry = False
        self._most_open = MAX_OPEN_RUNS
        self._refused = 0
        self._started = self._moved = math.inf
        self._arrived = 0

    def slow(self, usual: float) -> bool:
        """Return whether a second source should be asked at the same time."""
        now = time.monotonic()
        left = self._want.bytes_left - self._arrived if self._want.plan is None else self._want.bytes_left
        piece = min(PIECE_BYTES, self._want.length)
        return is_slow(now - self._moved, now - self._started, self._arrived, left, usual, piece)

    @property
    def rate(self) -> float:
        """Bytes a second so far."""
        elapsed = time.monotonic() - self._started
        return self._arrived / elapsed if elapsed > 0 else 0.0

    @property
    def given_up(self) -> bool:
        """Whether it is ending because it is slow."""
        return self._gave_up is not None

    def give_up(self, reason: str) -> None:
        """End it as a failure of the source; what it brought stays."""
        self._gave_up = self._gave_up or reason
        self.cancel()

    @property
    def idle(self) -> float:
        """Seconds since the last piece; negative before it has started."""
        return time.monotonic() - self._moved

    def cancel(self) -> None:
        """End it; what it brought stays."""
        with self._lock:
            self._cancelled = True
            runs = list(self._open)
        for run in runs:
            run.stream.cancel()

    def run(self) -> bool:
        """Bring what this source can. Returns whether the blob is complete, and has its name.

        Raises CallFailed, NothingYet, BadBytes, FalseCommitment, StoreError or OSError.
        """
        self._started = self._moved = time.monotonic()
        try:
            with self._tools.quality.stream():
                return self._run()
        except CallFailed as error:
            if self._gave_up is None:
                raise
            raise CallFailed(Cause.SLOW, self._gave_up) from error
        finally:
            self._lane.close()

    def _run(self) -> bool:
        if piece_count(self._want.length) == 1:
            self._single_piece()
            return True
        plan = None
        try:
            self._first_run()
            plan, partial = self._planned()
            self._claim_first_run(plan)
            self._bring(plan, partial)
        finally:
            for run in self._open:
                if plan is not None:
                    plan.give_back(self._source, run.pieces)
            self.cancel()
        if plan.left:
            return False
        finish(self._tools, self._want, partial)
        return True

    def _single_piece(self) -> None:
        # A blob of one piece needs no manifest: its length and its bytes give its digest.
        want = self._want
        pieces: list[bytes | memoryview] = []
        for piece in self._fetch(range(1)).stream:
            pieces.append(piece)
            if len(pieces) > 1:
                raise BadBytes("piece", "it sent more than the one piece that it was asked for")
            self._note(len(piece))
        if not pieces:
            raise CallFailed(Cause.BROKEN, "it ended the stream without a piece")
        manifest = Manifest(len(pieces[0]), (piece_digest(pieces[0]),))
        if manifest.digest != want.digest:
            if manifest.length == PIECE_BYTES:
                # It may be the first piece of a longer blob, of which the digest is.
                self._manifest()
            raise BadBytes("piece", "its bytes are not those committed to")
        self._check_length(manifest)
        assembly = self._tools.store.begin(manifest, want.round)
        try:
            assembly.write(0, pieces[0])
            self._tools.reader.remember(want.digest, manifest)
            assembly.finish()
        finally:
            assembly.abandon()

    def _planned(self) -> tuple[Plan, Partial]:
        want = self._want
        with want.lock:
            if want.plan is not None and want.partial is not None:
                return want.plan, want.partial
        manifest = self._manifest()
        return open_plan(self._tools, want, manifest)

    def _first_run(self) -> None:
        """Ask for an update's first pieces before their hashes are here: that is a round trip less for each."""
        want = self._want
        if want.kind is not Kind.UPDATE:
            return
        with want.lock:
            first = want.plan is None and not want.asked and self._choice.held is None
            want.asked = True
        if first:
            limit = SMALLEST_RUN if self._lane.soon else self._limit
            self._fetch(range(min(limit, piece_count(want.length))))

    def _claim_first_run(self, plan: Plan) -> None:
        """Take what has been asked for, unless some of it is here or another source brings it."""
        if self._open:
            wanted = self._open[0].pieces
            taken = plan.take(self._source, len(wanted))
            if taken != wanted:
                plan.give_back(self._source, taken)
                with self._lock:
                    self._open.popleft().stream.cancel()

    def _manifest(self) -> Manifest:
        want, length = self._want, 0
        pieces: list[bytes] = []
        # All from this source: pages of two could not be told apart when they do not lead to the digest.
        while not length or len(pieces) < piece_count(length):
            request = wire.ManifestRequest(digest=want.digest, first=len(pieces))
            asked = time.monotonic()
            reply = self._tools.links.call(self._source, "GetManifest", request, wire.Manifest, CALL_SECONDS)
            self._tools.quality.answered(self._source, time.monotonic() - asked)
            # Another length than the committed one is not the source's fault if it leads to the digest.
            if not 0 < reply.length <= MAX_BLOB_BYTES or length not in (0, reply.length):
                raise BadBytes("manifest", f"it says {reply.length} bytes, {want.length} are committed to")
            length, page = reply.length, reply.pieces
            if len(page) != min(piece_count(length) - len(pieces), MAX_PIECES_PER_MANIFEST) * DIGEST_BYTES:
                raise BadBytes("manifest", "its piece list is not the one committed to")
            pieces += (page[at : at + DIGEST_BYTES] for at in range(0, len(page), DIGEST_BYTES))
            self._moved = time.monotonic()
        manifest = Manifest(length, tuple(pieces))
        if manifest.digest != want.digest:
            raise BadBytes("manifest", "its piece list is not the one committed to")
        self._check_length(manifest)
        return manifest

    def _check_length(self, manifest: Manifest) -> None:
        # The root covers the length, so who shows a manifest that leads to it has shown what the digest stands for.
        if manifest.length != self._want.length:
            raise FalseCommitment(
                f"{self._want.length} bytes were committed to, and the digest is that of {manifest.length} bytes"
            )

    def _bring(self, plan: Plan, partial: Partial) -> None:
        self._ahead(plan)
        while self._open:
            run = self._open[0]
            try:
                self._read(run, plan, partial)
                self._refused = 0
            except CallFailed as error:
                # It serves as many calls of this node as it may: no more runs beside the one that comes.
                self._most_open = 1
                self._refused += 1
                if self._cancelled:
                    raise
                if error.cause is not Cause.BUSY or run.arrived or not self._arrived or self._refused > MAX_OPEN_RUNS:
                    raise
                # What it is still counting may be a stream of this download that has just ended.
                time.sleep(BUSY_SECONDS * self._refused)
            with self._lock:
                self._open.popleft()
            self._adapt(self._moved - run.began)
            rest = run.pieces[run.arrived :]
            plan.give_back(self._source, rest)
            if not self._refused:
                if not run.arrived and (self._dry or not self._arrived):
                    raise NothingYet("it ended the stream without a piece")
                # One that receives the blob itself may not have got to a run that was asked for early: ask once more.
                self._dry = not run.arrived
            if plan.left:
                self._ahead(plan)

    def _read(self, run: _Run, plan: Plan, partial: Partial) -> None:
        for piece in run.stream:
            if run.arrived == len(run.pieces) or not partial.write(run.pieces[run.arrived], piece):
                raise BadBytes("piece", f"its piece {run.pieces.start + run.arrived} is not the one committed to")
            plan.arrived(run.pieces[run.arrived])
            run.arrived += 1
            self._note(len(piece))
            run.began = run.began or self._moved
            if self._arrived == len(piece):
                self._tools.begun(self._want)
            if not plan.left or plan.has(run.pieces[run.arrived :]):
                run.stream.cancel()
                return
            self._ahead(plan)

    def _adapt(self, seconds: float) -> None:
        if seconds < RUN_SECONDS:
            self._limit = min(2 * self._limit, MAX_PIECES_PER_FETCH)
        elif seconds > 2 * RUN_SECONDS:
            self._limit = max(self._limit // 2, SMALLEST_RUN)

    def _ahead(self, plan: Plan) -> None:
        """Ask for more while what was asked for and has not come is a run or less; half, if other sources want some."""
        limit = SMALLEST_RUN if self._lane.soon else self._limit
        enough = limit if self._alone else limit // 2
        if self._want.kind is not Kind.UPDATE and self._tools.hurry():
            limit, enough = SMALLEST_RUN, 0
        while len(self._open) < self._most_open and self._coming() <= enough:
            # What another source is bringing is worth it only when there is nothing else to do.
            again = not self._open and self._others_slow()
            pieces = plan.take(self._source, limit, self._choice.held, again=again)
            if not pieces:
                return
            try:
                self._fetch(pieces)
            except BaseException:
                plan.give_back(self._source, pieces)
                raise

    @property
    def _alone(self) -> bool:
        """Whether this is the want's only source just now."""
        return len(self._want.running) <= 1

    def _coming(self) -> int:
        return sum(len(run.pieces) - run.arrived for run in self._open)

    def _fetch(self, pieces: range) -> _Run:
        want = self._want
        size = sum(piece_length(want.length, index) for index in (pieces[0], pieces[-1]))
        size += max(0, len(pieces) - 2) * PIECE_BYTES
        # What was asked for before comes before it.
        deadline = CALL_SECONDS + math.ceil((size + self._coming() * PIECE_BYTES) / MIN_BYTES_PER_SECOND)
        deadline = min(deadline, LONGEST_CALL_SECONDS)
        kind = _WIRE_KINDS[want.kind]
        stream = self._lane.fetch(want.digest, pieces[0], len(pieces), deadline, kind)
        run = _Run(stream, pieces)
        with self._lock:
            if self._cancelled:
                stream.cancel()
            self._open.append(run)
        return run

    def _note(self, count: int) -> None:
        now = time.monotonic()
        if not self._arrived:
            self._tools.quality.answered(self._source, now - self._started)
        self._arrived += count
        self._moved = now
        self._tools.quality.arrived(count)

    def _others_slow(self) -> bool:
        others = [running for running in list(self._want.running.values()) if running is not self]
        return bool(others) and all(running.slow(self._tools.quality.share()) for running in others)

    def measured(self) -> tuple[int, float]:
        """Return the bytes that came and the seconds they took."""
        return self._arrived, max(0.0, self._moved - self._started)


def open_plan(tools: Tools, want: Want, manifest: Manifest) -> tuple[Plan, Partial]:
    """Begin to assemble the want's blob, or go on with what an earlier process left. Any thread, once per want."""
    with want.lock:
        if want.plan is None or want.partial is None:
            assembly = tools.store.resume(manifest, want.round)
            want.partial = tools.holdings.begin(assembly)
            want.plan = Plan(len(manifest.pieces), assembly.missing())
            if want.ended:
                tools.holdings.end(want.partial)
        return want.plan, want.partial


def finish(tools: Tools, want: Want, partial: Partial) -> None:
    """Give a blob of which nothing is missing its name. Any thread. Raises StoreError or OSError."""
    with want.lock:
        tools.reader.remember(want.digest, partial.manifest, partial.checked)
        partial.finish()
    tools.holdings.end(partial)
