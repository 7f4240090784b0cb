"""Anti-entropy: asking others what they know about the rounds of open wants. Runs on trio."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection
from functools import partial

import trio

from psyche_node.identity import node_id
from psyche_node.network.announcements import Announcements
from psyche_node.network.directory import Directory
from psyche_node.network.download import CALL_SECONDS
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.threads import in_thread
from psyche_node.network.wants import Chooser, Want
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
ASK_PEERS = 3
MAX_ASKED = 8


class Asking:
    """Calls ``Since`` at a few members. What they know becomes announcements and offers."""

    def __init__(
        self,
        links: Links,
        directory: Directory,
        announcements: Announcements,
        chooser: Chooser,
        wants: Collection[Want],
        backlog: Callable[[], float],
        take_announcement: Callable[[bytes, bytes], object],
        offered: Callable[[Want, bytes, bytes | None], None],
    ) -> None:
        """``wants``: a view of the open ones. ``backlog``: the seconds that all of them together should take.

        ``offered`` takes a want, who has it, and which pieces, one bit each; None is all of them.
        """
        self._links, self._directory, self._announcements, self._chooser = links, directory, announcements, chooser
        self._wants, self._backlog, self._take, self._offered = wants, backlog, take_announcement, offered
        self._limiter = trio.CapacityLimiter(2 * MAX_ASKED)

    def ask_around(self, nursery: trio.Nursery) -> None:
        """Ask a few random members, and parents that said nothing, what they know about the rounds with open wants."""
        others = self._directory.sources(self._directory.others().values())
        peers = [key for key in others if self._directory.reachable(key)]
        now, backlog = trio.current_time(), self._backlog()
        for round in {want.round for want in self._wants}:
            asked = set(random.sample(peers, min(ASK_PEERS, len(peers))))
            for want in self._wants:
                if want.round == round and len(asked) < MAX_ASKED and self._chooser.impatient(want, now, backlog):
                    asked.update(self._chooser.parent(want))
            for peer in asked:
                nursery.start_soon(self._ask, peer, round)

    async def _ask(self, peer: bytes, round: int) -> None:
        if self._limiter.available_tokens < 1:
            return
        now, backlog = trio.current_time(), self._backlog()
        open_wants = [want for want in self._wants if want.round == round]
        wanted = {want.digest for want in open_wants if self._chooser.impatient(want, now, backlog)}
        request = wire.SinceRequest(round=round, have=self._announcements.bitmap(round), wanted=sorted(wanted)[:256])
        try:
            reply = await in_thread(
                partial(self._links.call, peer, "Since", request, wire.SinceReply, CALL_SECONDS), self._limiter
            )
        except CallFailed as error:
            log.debug("asking %s about round %d failed: %s", node_id(peer), round, error)
            return
        for raw in reply.announcements:
            self._take(raw, peer)
        bitmaps: dict[bytes, bytes | None] = {holding.digest: holding.pieces for holding in reply.partial}
        bitmaps.update((digest, None) for digest in reply.held)
        for want in open_wants:
            if want.digest in wanted and want.digest in bitmaps:
                self._offered(want, peer, bitmaps[want.digest])
