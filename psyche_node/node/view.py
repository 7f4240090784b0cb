"""The newest state of the run on chain, shared by the tasks of a node."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.client import CoordinatorClient, Pulse
from psyche_node.node.changes import Changes


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

    async def follow(self) -> None:
        """Run until cancelled."""
        async for pulse in self._chain.watch():
            self._pulse = pulse
            self._changes.fire()

    async def until(self, condition: Callable[[Pulse], bool]) -> Pulse:
        """Wait for a state that meets ``condition``."""
        while self._pulse is None or not condition(self._pulse):
            await self._changes.beyond(self._changes.version)
        return self._pulse

    async def after(self, seen: Pulse) -> Pulse:
        """Wait for a state newer than ``seen``."""
        return await self.until(lambda pulse: pulse is not seen)
