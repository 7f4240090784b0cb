"""How an announcement reaches the other members: the cheap ways first, and gossip for those who are left.

A direct gRPC call costs both sides half a millisecond; a stream over a libp2p connection that is there, five; a
delivery by gossip nine to eighteen, at every node. When all members announce at once, gossip alone would keep all of
them busy for seconds. So it carries what could not be delivered otherwise, after the burst, and not for members that
seem dead: the chain tells everybody what exists, and who lacks an announcement asks around.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.directory import Directory
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.swarm import Swarm
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
MAX_PUSHED = 64
PUSH_SECONDS = 5.0
PUSHES_AT_ONCE = 8
TELLS_AT_ONCE = 8
MEET_EVERY = 1.0
# Gossip starts this long after the direct calls have ended, at random in between: when many nodes have to, not at once.
GOSSIP_AFTER = (0.5, 1.5)
# A member that was missed this many times in a row is taken for dead; gossip is made for its sake now and then only.
MISSES = 3
NOW_AND_THEN = 10


class Spreader:
    """Spreads this node's announcements. Runs on trio."""

    def __init__(self, directory: Directory, links: Links, swarm: Swarm) -> None:
        self._directory, self._links, self._swarm = directory, links, swarm
        self._pushing = trio.CapacityLimiter(PUSHES_AT_ONCE)
        self._telling = trio.CapacityLimiter(TELLS_AT_ONCE)
        self._missed: Counter[bytes] = Counter()
        self.met: dict[bytes, bytes] = {}
        """The members that were called once, and with which certificate."""

    async def meet(self) -> None:
        """Call each member once before there is anything to say, one after another, until cancelled.

        The first call to a peer costs both sides ten times as much as the others: handshakes, certificates. At the end
        of the first round all of them together would take seconds.
        """
        while True:
            connected = self._swarm.connected()
            for key in self._directory.others().values():
                record = self._directory.record(key)
                if record is not None and key in connected and self.met.get(key) != record.tls_leaf:
                    self.met[key] = record.tls_leaf
                    await self._push(key)
            await trio.sleep(MEET_EVERY)

    async def spread(self, raw: bytes) -> None:
        """Bring an announcement to every member that can be reached. Takes as long as the slowest of them."""
        members = set(self._directory.others().values())
        for gone in (self._missed.keys() | self.met.keys()) - members:
            self._missed.pop(gone, None)
            self.met.pop(gone, None)
        connected = self._swarm.connected()
        # In an order of its own, or all nodes would begin with the same one; those known to be up before the others,
        # which may cost a deadline each.
        order = random.sample(sorted(members), len(members))
        order.sort(key=lambda key: key not in connected)
        reached: set[bytes] = set()
        async with trio.open_nursery() as nursery:
            for key in order[:MAX_PUSHED]:
                nursery.start_soon(self._reach, key, raw, reached)
        for key in order[:MAX_PUSHED]:
            self._missed[key] = 0 if key in reached else self._missed[key] + 1
        left = [key for key in order if key not in reached]
        if any(self._missed[key] < MISSES or self._missed[key] % NOW_AND_THEN == 0 for key in left):
            await trio.sleep(random.uniform(*GOSSIP_AFTER))
            log.debug("%d members were not reached directly; gossiping", len(left))
            await self._swarm.gossip.announcement(raw)

    async def _reach(self, key: bytes, raw: bytes, reached: set[bytes]) -> None:
        if await self._push(key, raw) or await self._tell(key, raw):
            reached.add(key)

    async def _push(self, key: bytes, *announcements: bytes) -> bool:
        if self._directory.record(key) is None:
            return False
        request = wire.AnnounceRequest(announcements=announcements)
        call = partial(self._links.call, key, "Announce", request, wire.AnnounceReply, PUSH_SECONDS)
        try:
            await in_thread(call, self._pushing)
        except CallFailed as error:
            log.debug("announcing to %s failed: %s", node_id(key), error)
            return False
        return True

    async def _tell(self, key: bytes, raw: bytes) -> bool:
        async with self._telling:
            return key in self._swarm.connected() and await self._swarm.direct.tell(key, [raw])
