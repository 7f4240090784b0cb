"""Tick the state machine when a transition is due.

The chain itself says from which slot a tick succeeds (``due_slot``), so no second copy of the rules lives here. Every
node is ready to tick; each waits for its rank, which rotates by round, so that a transition normally costs one
transaction and a dead node delays it by a few slots.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.client import ChainUnavailable, CoordinatorClient, ProgramError, Pulse
from coordinator.state import Phase
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)
SLOTS_PER_RANK = 4


async def keep_ticking(chain: CoordinatorClient, view: ChainView, rank: Callable[[Pulse], int]) -> None:
    """Run until the run is finished. ``rank`` gives this node's place in the queue of tickers, 0 first."""
    while True:
        pulse = await view.until(lambda p: p.run.phase is Phase.FINISHED or _my_turn(p, rank(p)))
        if pulse.run.phase is Phase.FINISHED:
            return
        try:
            await chain.tick()
        except ProgramError as error:
            log.debug("tick in %s of round %d: %s", pulse.run.phase.name, pulse.run.round, error)
        except ChainUnavailable as error:
            log.warning("tick not sent, another node may: %s", error)
        # What arrived while the tick was on its way may be older than its effect.
        await view.next()


def _my_turn(pulse: Pulse, rank: int) -> bool:
    return pulse.header.due(pulse.slot - SLOTS_PER_RANK * rank)
