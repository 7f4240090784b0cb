"""The newest state of the run on chain, shared by the tasks of a node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from coordinator.client import ChainUnavailable, CoordinatorClient, Pulse, RpcError
from coordinator.pulses import Delay
from coordinator.state import MalformedAccount
from psyche_node.node.changes import Changes

log = logging.getLogger(__name__)
OUTAGE_SECONDS = 3600.0
T = TypeVar("T")


class ChainView:
    """One task follows the chain; the others wait here for what they need."""

    def __init__(self, chain: CoordinatorClient) -> None:
        self._chain = chain
        self._pulse: Pulse | None = None
        self._changes = Changes()

    @property
    def pulse(self) -> Pulse:
        """Raises RuntimeError before the first state has arrived: wait with ``until`` first."""
        if self._pulse is None:
            raise RuntimeError("no state of the run has arrived yet")
        return self._pulse

    async def follow(self, delay: Delay | None = None) -> None:
        """Run until cancelled. ``delay`` is how many slots after a transition is due this node would tick."""
        async for pulse in self._chain.watch(delay):
            self._pulse = pulse
            self._changes.fire()

    async def until(self, condition: Callable[[Pulse], bool]) -> Pulse:
        """Wait for a state that meets ``condition``."""
        while self._pulse is None or not condition(self._pulse):
            await self._changes.beyond(self._changes.version)
        return self._pulse

    async def next(self) -> Pulse:
        """Wait for the next state to arrive, be it like the present one."""
        await self._changes.beyond(self._changes.version)
        return self.pulse

    async def read(self, what: Callable[[], Awaitable[T]]) -> T:
        """Return what ``what`` returns, however long the chain is away or answers with what is no state of a run.

        Each new attempt waits for a state to arrive, which is when the chain is back. Raises ChainUnavailable, RpcError
        or MalformedAccount if ``what`` still fails after an hour.
        """
        give_up = asyncio.get_running_loop().time() + OUTAGE_SECONDS
        while True:
            try:
                return await what()
            except (ChainUnavailable, RpcError, MalformedAccount) as error:
                if asyncio.get_running_loop().time() >= give_up:
                    raise
                log.warning("nothing usable from the chain, trying again when it is back: %s", error)
            await self.next()
