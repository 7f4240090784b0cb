"""Sends the blobs of this node to public members while it is private. Runs on trio."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.push import parts_of, push_seconds
from psyche_node.network.reader import Reader
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
# Public members that each blob goes to: the others get it from them.
COPIES = 2
MAX_AT_ONCE = 4
ANNOUNCE_SECONDS = 5.0
RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 10.0


@dataclass(eq=False)
class _Blob:
    round: int
    digest: bytes
    length: int
    announcement: bytes
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    started: bool = False


@dataclass(slots=True)
class _Copies:
    """Where one blob is, where it is being brought to, and who is to be tried again when."""

    holders: set[bytes] = field(default_factory=set)
    running: set[bytes] = field(default_factory=set)
    failures: Counter[bytes] = field(default_factory=Counter)
    retry_at: dict[bytes, float] = field(default_factory=dict)
    slow: bool = False
    """One did not get on. This node's own line may be the reason, so there is one at a time from then on."""

    def next(self, public: list[bytes], now: float) -> bytes | None:
        """Return the first member of ``public`` that may be tried now, if there is one."""
        if self.slow and self.running:
            return None
        done = self.holders | self.running
        return next((key for key in public if key not in done and self.retry_at.get(key, 0.0) <= now), None)

    def failed(self, target: bytes, cause: Cause, now: float) -> None:
        self.failures[target] += 1
        self.slow |= cause is Cause.SLOW
        # It may not have heard yet that the blob is committed to.
        longest = RETRY_SECONDS if cause in (Cause.BUSY, Cause.UNWANTED) else LONGEST_RETRY_SECONDS
        self.retry_at[target] = now + min(longest, RETRY_SECONDS * 2.0 ** min(self.failures[target] - 1, 8))


class Pusher:
    """What this node has published and not forgotten."""

    def __init__(
        self,
        links: Links,
        targets: Callable[[int], list[bytes]],
        reader: Reader,
        private: Callable[[], bool],
    ) -> None:
        """``targets(round)`` returns the public members, the best first. ``private``: does this node have to push?"""
        self._links, self._targets, self._reader, self._private = links, targets, reader, private
        self._blobs: dict[bytes, _Blob] = {}
        self._places = trio.CapacityLimiter(MAX_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Push until cancelled."""
        async with trio.open_nursery() as self._nursery:
            self.wake()
            await trio.sleep_forever()

    def published(self, round: int, digest: bytes, length: int, announcement: bytes) -> None:
        """This node serves a blob of its own from now on. ``announcement`` is the signed one."""
        self._blobs.setdefault(digest, _Blob(round, digest, length, announcement))
        self.wake()

    def forget(self, before_round: int) -> None:
        for digest, blob in list(self._blobs.items()):
            if blob.round < before_round:
                del self._blobs[digest]
                blob.scope.cancel()

    def wake(self) -> None:
        """Whether this node is private may have changed."""
        if not self._private() or self._nursery is None:
            return
        for blob in self._blobs.values():
            if not blob.started:
                blob.started, blob.scope = True, trio.CancelScope()
                self._nursery.start_soon(self._spread, blob)

    async def _spread(self, blob: _Blob) -> None:
        copies = _Copies()
        # At once: one receiver that is slow, or wants to be, must not keep the blob from all others.
        with blob.scope:
            async with trio.open_nursery() as nursery:
                for _ in range(COPIES):
                    nursery.start_soon(self._copy, blob, copies)
            holders = ", ".join(map(node_id, copies.holders))
            log.debug("%s is at %s", blob.digest.hex()[:16], holders or "nobody else yet")
        if not self._private():
            blob.started = False

    async def _copy(self, blob: _Blob, copies: _Copies) -> None:
        """Bring the blob to one member that nobody else brings it to."""
        while self._private():
            public = self._targets(blob.round)
            if public and copies.holders.issuperset(public):
                break
            target = copies.next(public, trio.current_time())
            if target is None:
                await trio.sleep(RETRY_SECONDS / 2)
                continue
            copies.running.add(target)
            try:
                await self._push(blob, target)
                copies.holders.add(target)
                break
            except CallFailed as error:
                log.debug("pushing %s to %s failed: %s", blob.digest.hex()[:16], node_id(target), error)
                copies.failed(target, error.cause, trio.current_time())
            finally:
                copies.running.discard(target)

    async def _push(self, blob: _Blob, target: bytes) -> None:
        # Without it the blob is not taken by whoever does not look for it yet.
        request = wire.AnnounceRequest(announcements=[blob.announcement])
        announce = partial(self._links.call, target, "Announce", request, wire.AnnounceReply, ANNOUNCE_SECONDS)
        await in_thread(announce, self._places)
        parts = parts_of(blob.round, blob.digest, self._reader)
        await in_thread(partial(self._links.push, target, parts, push_seconds(blob.length)), self._places)
