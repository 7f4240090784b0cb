"""The share of the batch follows the measured speed, without a transaction for every flicker of the clock."""

from __future__ import annotations

import pytest
from node_stage import ScriptedChain, run_async

from coordinator.client import ChainUnavailable, RpcError
from coordinator.failures import refused
from psyche_node.node.share import Share


def sent(chain: ScriptedChain) -> list[int]:
    return [what[1] for what in chain.sent if what[0] == "set_share"]


def test_a_share_is_the_measured_speed() -> None:
    async def test() -> None:
        chain = ScriptedChain()
        share = Share(chain)  # type: ignore[arg-type]
        await share.follow(tokens=4000, seconds=2.0, most=0)
        assert sent(chain) == [2000]
        await share.follow(tokens=4000, seconds=2.2, most=0)
        assert sent(chain) == [2000], "a tenth slower is not worth a transaction"
        for _ in range(8):
            await share.follow(tokens=4000, seconds=1.0, most=0)
        assert sent(chain)[-1] > 3300
        share.missed()
        await share.follow(tokens=4000, seconds=1.0, most=0)
        assert len(sent(chain)) == len(set(sent(chain))), "the program has halved it: it is sent again"

    run_async(test())


@pytest.mark.parametrize(
    "error", [ChainUnavailable("away"), refused("no lamports"), RpcError("getLatestBlockhash", -32000, "busy")]
)
def test_a_share_keeps_to_the_runs_bound_and_survives_a_refusal(error: Exception) -> None:
    async def test() -> None:
        chain = ScriptedChain()
        chain.errors["set_share"] = [error]
        share = Share(chain)  # type: ignore[arg-type]
        await share.follow(tokens=10**9, seconds=0.0, most=500)
        await share.follow(tokens=10**9, seconds=0.0, most=500)
        assert sent(chain) == [500, 500], "tried again"
        fixed = Share(chain, fixed=77)  # type: ignore[arg-type]
        await fixed.follow(tokens=10**9, seconds=1.0, most=0)
        assert sent(chain)[2:] == [], "it joined with that"
        fixed.missed()
        await fixed.follow(tokens=1, seconds=1.0, most=0)
        assert sent(chain)[2:] == [77]

    run_async(test())
