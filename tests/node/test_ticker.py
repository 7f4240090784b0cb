from __future__ import annotations

import asyncio

import pytest
from node_stage import ScriptedChain, run_async, settle, watching
from node_values import pulse_of

from coordinator.client import ChainUnavailable, ProgramError, RpcError
from coordinator.errors import ErrorCode
from coordinator.failures import refused
from coordinator.layout import UNKNOWN_SLOT
from coordinator.state import Phase
from psyche_node.node.ticker import _my_turn, keep_ticking


@pytest.mark.parametrize("delay", [0, 4, 12])
def test_each_waits_for_its_turn(delay: int) -> None:
    turn = 100 + delay
    assert not _my_turn(pulse_of(slot=turn - 1, due=100), delay)
    assert _my_turn(pulse_of(slot=turn, due=100), delay)
    assert not _my_turn(pulse_of(slot=2**40, due=UNKNOWN_SLOT), delay)


def test_ticks_once_for_a_transition_and_ends_with_the_run() -> None:
    async def test() -> None:
        chain = ScriptedChain()
        ticks = []
        async with watching(chain) as view:

            async def tick() -> None:
                # The state that arrives while the tick is under way is older than its effect.
                chain.push(pulse_of(slot=11, due=10))
                await view.until(lambda pulse: pulse.slot == 11)
                ticks.append(view.pulse.slot)

            chain.tick = tick  # type: ignore[method-assign]
            ticking = asyncio.create_task(keep_ticking(chain, view, lambda pulse: 0))  # type: ignore[arg-type]
            chain.push(pulse_of(slot=10, due=10))
            await settle(lambda: bool(ticks))
            chain.push(pulse_of(Phase.ROUND_WITNESS, slot=12, due=50))
            await view.next()
            chain.push(pulse_of(Phase.FINISHED, slot=13))
            await ticking
        assert ticks == [11]

    run_async(test())


@pytest.mark.parametrize(
    "error",
    [
        ProgramError(ErrorCode.NOT_DUE, ()),
        ChainUnavailable("away"),
        refused("no lamports"),
        RpcError("getLatestBlockhash", -32000, "busy"),
    ],
)
def test_tick_that_fails_is_tried_again_while_it_is_due(error: Exception) -> None:
    async def test() -> None:
        chain = ScriptedChain()
        chain.errors["tick"] = [error]
        async with watching(chain) as view:
            ticking = asyncio.create_task(keep_ticking(chain, view, lambda pulse: 0))  # type: ignore[arg-type]
            for slot in (10, 11):
                chain.push(pulse_of(slot=slot, due=10))
                await settle(lambda slot=slot: len(chain.sent) == slot - 9)  # type: ignore[misc]
            chain.push(pulse_of(Phase.FINISHED))
            await ticking

    run_async(test())
