"""Sends the blobs of this node to public members while it is private. Runs on trio."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.push import parts_of, push_seconds
from psyche_node.network.store import Reader
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
                blob.started = True
                self._nursery.start_soon(self._spread, blob)

    async def _spread(self, blob: _Blob) -> None:
        holders: set[bytes] = set()
        retry_at: dict[bytes, float] = {}
        failures: dict[bytes, int] = {}
        with blob.scope:
            while len(holders) < COPIES and self._private():
                public = self._targets(blob.round)
                if public and holders.issuperset(public):
                    break
                now = trio.current_time()
                due = [key for key in public if key not in holders and retry_at.get(key, 0.0) <= now]
                if not due:
                    await trio.sleep(RETRY_SECONDS / 2)
                    continue
                target = due[0]
                try:
                    await self._push(blob, target)
                    holders.add(target)
                except CallFailed as error:
                    log.debug("pushing %s to %s failed: %s", blob.digest.hex()[:16], node_id(target), error)
                    count = failures[target] = failures.get(target, 0) + 1
                    # It may not have heard yet that the blob is committed to.
                    longest = RETRY_SECONDS if error.cause in (Cause.BUSY, Cause.UNWANTED) else LONGEST_RETRY_SECONDS
                    retry_at[target] = trio.current_time() + min(longest, RETRY_SECONDS * 2.0 ** min(count - 1, 8))
            log.debug("%s is at %s", blob.digest.hex()[:16], ", ".join(map(node_id, holders)) or "nobody else yet")
        if not self._private():
            blob.started = False

    async def _push(self, blob: _Blob, target: bytes) -> None:
        # Without it the blob is not taken by whoever does not look for it yet.
        request = wire.AnnounceRequest(announcements=[blob.announcement])
        announce = partial(self._links.call, target, "Announce", request, wire.AnnounceReply, ANNOUNCE_SECONDS)
        await in_thread(announce, self._places)
        parts = parts_of(blob.round, blob.digest, self._reader)
        await in_thread(partial(self._links.push, target, parts, push_seconds(blob.length)), self._places)
