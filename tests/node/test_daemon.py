"""What a node makes of the member table and of the chain's answers, before and beside the round loop."""

from __future__ import annotations

import dataclasses

from node_values import member_of

from coordinator.state import MemberStatus
from psyche_node.network.messages import MemberEntry
from psyche_node.node.daemon import _admitted


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
    assert _admitted(table) == [MemberEntry(slot=slot, node_key=one.hex()) for slot, one in expected.items()]
