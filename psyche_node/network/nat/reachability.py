"""What a node finds out about itself: can others open a connection to it, and at which address. Runs on trio.

A few members that can be reached are asked where the calls come from and whether this node's server answers there.
Until somebody has said otherwise a node takes itself for public. Seen from another address than its own it is behind
NAT, and private unless more than half of those asked reached it there.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import trio

from psyche_node.identity import node_id
from psyche_node.network.directory import Directory
from psyche_node.network.links import CallFailed, Links
from psyche_node.network.nat.dialback import DIAL_EVERY, DIAL_SECONDS
from psyche_node.network.statements import Malformed, split_address
from psyche_node.network.threads import in_thread
from psyche_node.network.wire import node_pb2 as wire

log = logging.getLogger(__name__)
HELPERS = 3
CALL_SECONDS = 3 * DIAL_SECONDS + 1.0
CHECK_PRIVATE_EVERY = 120.0
CHECK_PUBLIC_EVERY = 600.0
# While nobody could be asked yet, or nobody answered.
RETRY_SECONDS = 1.25 * DIAL_EVERY
LONGEST_RETRY_SECONDS = 30.0

Setting = Literal["auto", "yes", "no"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known: None is not known yet. ``ip`` is where this node's connections come from, or empty."""

    private: bool | None = None
    ip: str = ""


class Reachability:
    """This node's standing, found out again from time to time."""

    def __init__(
        self, setting: Setting, own_ip: str, links: Links, directory: Directory, changed: Callable[[], Awaitable[None]]
    ) -> None:
        """``own_ip`` is the address of the interface. ``changed`` is called when ``standing`` has changed."""
        self._setting, self._own_ip = setting, own_ip
        self._links, self._directory, self._changed = links, directory, changed
        self.standing = Standing({"auto": None, "yes": False, "no": True}[setting])

    @property
    def private(self) -> bool:
        return bool(self.standing.private)

    async def run(self, port: int) -> None:
        """Keep the standing up to date until cancelled. ``port`` is that of this node's gRPC server."""
        if self._setting == "yes":
            return
        wait = RETRY_SECONDS
        while True:
            if await self._check(port):
                wait = RETRY_SECONDS
                every = CHECK_PRIVATE_EVERY if self.standing.private else CHECK_PUBLIC_EVERY
                await trio.sleep(every * random.uniform(0.8, 1.2))
            else:
                await trio.sleep(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, LONGEST_RETRY_SECONDS) if self._helpers() else RETRY_SECONDS

    async def _check(self, port: int) -> bool:
        """Ask around. Returns whether anybody answered."""
        helpers = self._helpers()
        seen = await self._ask(helpers, 0)
        if not seen:
            return False
        ip, _ = Counter(ip for ip, _ in seen).most_common(1)[0]
        if self._setting == "no":
            await self._set(Standing(True, ip))
            return True
        if self.standing.private is None and ip != self._own_ip:
            # Most likely private; others need not try in vain while that is found out.
            await self._set(Standing(True, ip))
        answers = await self._ask(helpers, port)
        if not answers:
            return False
        reached = [ip for ip, reached in answers if reached]
        private = 2 * len(reached) <= len(answers)
        await self._set(Standing(private, ip if private else Counter(reached).most_common(1)[0][0]))
        return True

    def _helpers(self) -> list[bytes]:
        keys = self._directory.public(self._directory.others().values())
        return random.sample(keys, min(HELPERS, len(keys)))

    async def _ask(self, helpers: list[bytes], port: int) -> list[tuple[str, bool]]:
        answers: list[tuple[str, bool]] = []

        async def ask(helper: bytes) -> None:
            request = wire.DialBackRequest(port=port)
            call = partial(self._links.call, helper, "DialBack", request, wire.DialBackReply, CALL_SECONDS)
            try:
                reply = await in_thread(call)
                answers.append((split_address(reply.observed)[0], reply.reached))
            except (CallFailed, Malformed) as error:
                log.debug("%s could not say whether this node can be reached: %s", node_id(helper), error)

        async with trio.open_nursery() as nursery:
            for helper in helpers:
                nursery.start_soon(ask, helper)
        return answers

    async def _set(self, standing: Standing) -> None:
        if standing == self.standing:
            return
        before, self.standing = self.standing, standing
        if standing.private and not before.private:
            log.warning(
                "others cannot open a connection to this node (they see it at %s): it fetches over its own connections "
                "and pushes its updates to public nodes. Forward its ports, or say reachable = 'yes' if they are",
                standing.ip,
            )
        elif before.private and not standing.private:
            log.info("others can open connections to this node, at %s", standing.ip)
        await self._changed()


__all__ = ["CALL_SECONDS", "DIAL_EVERY", "Reachability", "Setting", "Standing"]
