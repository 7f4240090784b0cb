from __future__ import annotations

import asyncio

import pytest
from node_stage import ScriptedChain, run_async, watching
from node_values import pulse_of, round_of

from coordinator.client import ChainUnavailable, RpcError
from coordinator.state import MalformedAccount
from psyche_node.node import view as views


def test_until_looks_at_the_present_state_first_and_next_does_not() -> None:
    async def test() -> None:
        chain = ScriptedChain()
        async with watching(chain) as view:
            with pytest.raises(RuntimeError, match="no state"):
                _ = view.pulse
            chain.push(pulse_of(slot=1))
            assert (await view.until(lambda pulse: True)).slot == 1
            assert (await view.until(lambda pulse: True)).slot == 1
            following = asyncio.create_task(view.next())
            await asyncio.sleep(0)
            assert not following.done()
            chain.push(pulse_of(slot=2))
            assert (await following).slot == 2

    run_async(test())


def test_read_outlasts_an_outage_and_waits_for_a_sign_of_life() -> None:
    async def test() -> None:
        chain = ScriptedChain()
        chain.table = (round_of(3),)
        chain.errors["rounds"] = [
            ChainUnavailable("away"),
            RpcError("getAccountInfo", -32000, "busy"),
            MalformedAccount("an endpoint that lies"),
        ]
        async with watching(chain) as view:
            reading = asyncio.create_task(view.read(chain.rounds))
            for left in (2, 1, 0):
                while len(chain.errors["rounds"]) > left:
                    await asyncio.sleep(0)
                assert not reading.done()
                chain.push(pulse_of())
            assert await reading == chain.table

    run_async(test())


def test_read_that_never_succeeds_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "OUTAGE_SECONDS", 0.0)

    async def test() -> None:
        chain = ScriptedChain()
        chain.errors["rounds"] = [ChainUnavailable("away")]
        async with watching(chain) as view:
            with pytest.raises(ChainUnavailable):
                await view.read(chain.rounds)

    run_async(test())
