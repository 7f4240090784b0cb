"""What a node makes of the member table and of the chain's answers, before and beside the round loop."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from node_stage import ScriptedChain, run_async, watching
from node_values import member_of, pulse_of

from coordinator.client import ChainUnavailable, ProgramError, RpcError
from coordinator.errors import ErrorCode
from coordinator.state import MemberStatus, Phase
from psyche_node.network.messages import MemberEntry
from psyche_node.node.config import NodeConfig
from psyche_node.node.daemon import Node, _admitted


def test_a_node_key_is_that_of_the_live_member_that_has_it() -> None:
    """The program lets another wallet join with the node key of a member that was dropped."""
    key = bytes([7]) * 32
    table = [
        dataclasses.replace(member_of(0, MemberStatus.DROPPED), node_key=key),
        member_of(1),
        dataclasses.replace(member_of(2, MemberStatus.PENDING), node_key=key),
        dataclasses.replace(member_of(3, MemberStatus.DROPPED), node_key=key),
        member_of(4, MemberStatus.DROPPED),
        member_of(5, MemberStatus.EJECTED),
    ]
    expected = {1: bytes([1]) * 32, 2: key, 4: bytes([4]) * 32}
    assert _admitted(table) == [
        MemberEntry(slot=slot, node_key=one.hex(), wallet=str(table[slot].wallet)) for slot, one in expected.items()
    ]


@pytest.mark.parametrize("found", [None, ErrorCode.ALREADY_READY, ErrorCode.MEMBER_NOT_ACTIVE])
def test_a_first_ready_that_is_not_confirmed_is_said_again(tmp_path: Path, found: ErrorCode | None) -> None:
    """And once it is known to have been heard, or the run to have gone on with this member, the node goes on."""
    chain = ScriptedChain()
    chain.errors["ready"] = [ChainUnavailable("away"), RpcError("sendTransaction", -32000, "busy")]
    chain.errors["ready"] += [] if found is None else [ProgramError(found, ())]
    config = NodeConfig(run="1" * 43, rpc=("http://localhost",), folder=tmp_path, model=tmp_path, data=tmp_path)

    async def test() -> None:
        async with watching(chain) as view:
            chain.push(pulse_of(Phase.WARMUP))
            parts = SimpleNamespace(
                chain=chain, view=view, run=pulse_of().run, loaded=SimpleNamespace(model_root="ab" * 32)
            )
            await view.until(lambda pulse: True)
            ready = asyncio.create_task(Node(config)._get_ready(parts, 1))  # type: ignore[arg-type]
            for said in (1, 2):
                while len(chain.sent) < said:
                    assert not ready.done()
                    await asyncio.sleep(0.001)
                chain.push(pulse_of(Phase.WARMUP))
            await ready
            assert chain.sent == [("ready", bytes.fromhex("ab" * 32))] * 3

    run_async(test())
