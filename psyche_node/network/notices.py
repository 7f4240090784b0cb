"""Telling the children in a blob's tree that they can take it from here, and hearing it from others. Runs on trio."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.directory import Directory
from psyche_node.network.fanout import Tree
from psyche_node.network.links import CallFailed, Cause, Links
from psyche_node.network.quality import Quality
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
NOTICE_SECONDS = 5.0
MAX_NOTICES = 16
# Offers of blobs that this node does not want yet: it may see the commitment on chain later than its parent.
MAX_EARLY_PER_HOLDER = 512
MAX_EARLY_HOLDERS = 512
_DEAD = (Cause.UNREACHABLE, Cause.IDENTITY, Cause.SLOW)
_GONE = (*_DEAD, Cause.NO_ADDRESS, Cause.PRIVATE)


class EarlyOffers:
    """Who offered a blob before it was wanted. Each holder has room for so many, so that none can displace others'."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, OrderedDict[bytes, None]] = OrderedDict()

    def add(self, digest: bytes, holder: bytes) -> None:
        digests = self._digests.setdefault(holder, OrderedDict())
        self._digests.move_to_end(holder)
        digests[digest] = None
        if len(digests) > MAX_EARLY_PER_HOLDER:
            digests.popitem(last=False)
        if len(self._digests) > MAX_EARLY_HOLDERS:
            self._digests.popitem(last=False)

    def take(self, digest: bytes) -> list[bytes]:
        """Return who offered it, and forget that."""
        holders = [holder for holder, digests in self._digests.items() if digest in digests]
        for holder in holders:
            del self._digests[holder][digest]
        return holders


class Notices:
    """Calls ``Have`` at the children. When a child is gone, its children are told in its place."""

    def __init__(self, links: Links, directory: Directory, quality: Quality) -> None:
        self._links, self._directory, self._quality = links, directory, quality
        self._calling = trio.CapacityLimiter(MAX_NOTICES)

    def tell(self, nursery: trio.Nursery, digest: bytes, tree: Tree) -> None:
        """Tell this node's children in ``tree``, in tasks of ``nursery``; nobody, if they cannot take it from here."""
        if not self._directory.own_private():
            self._tell(nursery, digest, tree, tree.children(self._directory.own_key))

    def _tell(self, nursery: trio.Nursery, digest: bytes, tree: Tree, children: Iterable[bytes]) -> None:
        for child in children:
            if self._quality.avoided(child) or not self._directory.reachable(child):
                # It failed a moment ago, or is behind NAT: it will ask on its own.
                self._tell(nursery, digest, tree, tree.children(child))
            else:
                nursery.start_soon(self._call, nursery, digest, tree, child)

    async def _call(self, nursery: trio.Nursery, digest: bytes, tree: Tree, child: bytes) -> None:
        request = wire.HaveRequest(digests=[digest])
        try:
            await in_thread(
                partial(self._links.call, child, "Have", request, wire.HaveReply, NOTICE_SECONDS), self._calling
            )
        except CallFailed as error:
            log.debug("telling %s about %s failed: %s", node_id(child), digest.hex()[:16], error)
            if error.cause in _GONE:
                if error.cause in _DEAD:
                    absent = error.cause is Cause.UNREACHABLE
                    self._quality.failed(child, f"it could not be told of a blob: {error}", absent=absent)
                self._tell(nursery, digest, tree, tree.children(child))
