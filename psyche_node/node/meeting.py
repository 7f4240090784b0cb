"""Before a member says that it is ready: it gets connected to the others, for alone it would train for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Set
from dataclasses import dataclass

from psyche_node.node.changes import Changes

log = logging.getLogger(__name__)
# For so long all are waited for; then enough of them are.
MEET_SECONDS = 10.0
SAY_SECONDS = 15.0
# In a large run nobody is connected to all: gossip reaches the others by way of these.
MOST_NEEDED = 8


def needed(others: int) -> int:
    """Connections to ``others`` other members with which an update can count: two thirds must hold it, this one too."""
    return min(MOST_NEEDED, -(-2 * (others + 1) // 3) - 1)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Who is there and who should be, by slot; ``changes`` fires when either may have changed."""

    others: Callable[[], Set[int]]
    connected: Callable[[], Set[int]]
    changes: Changes

    async def held(self, seconds: float, alone: bool) -> None:
        """Return when this member can do its part: all others are connected, or after a while as many as are needed.

        Args:
            seconds: then the program goes on, and one connection is enough; or none, if the run trains with a single
                member (``alone``).
        """
        loop = asyncio.get_running_loop()
        began = said = loop.time()
        patience = min(MEET_SECONDS, seconds)
        while True:
            version, now = self.changes.version, loop.time()
            waited = now - began
            others = self.others()
            here = others & self.connected()
            late = waited >= seconds
            wanted = needed(len(others)) if not late else 0 if alone else 1
            missing = sorted(others - here)
            if not missing:
                return
            if waited >= patience and len(here) >= wanted:
                through = "they may be reached through others" if here else "the run goes on with whoever is ready"
                log.warning("not connected to members %s yet; %s", missing, through)
                return
            if now - said >= SAY_SECONDS:
                said = now
                log.warning(
                    "not ready: connected to %d of %d other members, %d needed; missing: %s. Do they run? Look at "
                    "`bootstrap`, and whether their ports and this node's can be reached",
                    len(here),
                    len(others),
                    wanted,
                    missing,
                )
            turns = (began + patience, began + seconds, said + SAY_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(turn for turn in turns if turn > now)):
                    await self.changes.beyond(version)
