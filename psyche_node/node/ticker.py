"""Tick the state machine when a transition is due.

The chain itself says from which slot a tick succeeds (``due_slot``), so no second copy of the rules lives here. Every
node is ready to tick, and each waits for its turn (``coordinator.ticking``).
"""

from __future__ import annotations

import logging

from coordinator.client import ChainError, CoordinatorClient, ProgramError, Pulse
from coordinator.pulses import Delay
from coordinator.state import Phase
from psyche_node.node.view import ChainView

log = logging.getLogger(__name__)


async def keep_ticking(chain: CoordinatorClient, view: ChainView, delay: Delay) -> None:
    """Run until the run is finished. ``delay`` is how many slots after a transition is due this node ticks."""
    while True:
        pulse = await view.until(lambda p: p.run.phase is Phase.FINISHED or _my_turn(p, delay(p)))
        if pulse.run.phase is Phase.FINISHED:
            return
        try:
            await chain.tick()
        except ProgramError as error:
            log.debug("tick in %s of round %d: %s", pulse.run.phase.name, pulse.run.round, error)
        except ChainError as error:
            log.warning("tick not sent, another node may: %s", error)
        # What arrived while the tick was on its way may be older than its effect.
        await view.next()


def _my_turn(pulse: Pulse, delay: int) -> bool:
    return pulse.header.due(pulse.slot - delay)
