"""How a wallet stands in a run: who is let in, who comes in time, and why somebody is out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from node_values import KEY, included, member_of, pulse_of

from coordinator.state import MemberStatus, Phase
from psyche_node.exits import Exit, exit_for
from psyche_node.network.messages import MemberEntry
from psyche_node.node.standing import JoinRefused, RunFinished, admitted, check_in_time, why_dropped

ME = 1


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
        member_of(6, MemberStatus.DESYNCED),
    ]
    expected = {1: bytes([1]) * 32, 2: key, 4: bytes([4]) * 32, 6: bytes([6]) * 32}
    assert admitted(table) == [
        MemberEntry(slot=slot, node_key=one.hex(), wallet=str(table[slot].wallet)) for slot, one in expected.items()
    ]


@pytest.mark.parametrize(
    ("before", "fields", "words"),
    [
        (MemberStatus.PENDING, {"missed": 2}, "not ready"),
        (MemberStatus.ACTIVE, {"missed": 2}, "missed 2 rounds in a row"),
        (MemberStatus.ACTIVE, {"excluded": 2}, "2 times in a row two thirds of the witnesses did not hold its update"),
        (MemberStatus.ACTIVE, {}, "not ready"),
    ],
)
def test_why_a_member_was_dropped_is_said(before: MemberStatus, fields: dict[str, int], words: str) -> None:
    mine = dataclasses.replace(member_of(ME, MemberStatus.DROPPED), **fields)  # type: ignore[arg-type]
    limits = dataclasses.replace(pulse_of().run.limits, max_missed=2)
    assert words in why_dropped(mine, before, pulse_of(limits=limits).run)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, None),
        ({"phase": Phase.ROUND_TRAIN}, None),
        ({"phase": Phase.WARMUP, "round": 2, "sets": [included(0, ()), included(1, ())]}, None),
        ({"phase": Phase.WARMUP, "round": 2, "sets": [included(0, ()), included(1)]}, JoinRefused),
        ({"round": 2, "model_round": 2, "sets": [included(0), included(1)]}, None),
        ({"phase": Phase.ROUND_TRAIN, "round": 4, "final_rounds": 3}, JoinRefused),
        ({"round": 1, "sets": [included(0, ())], "checkpoint_root": KEY}, JoinRefused),
        ({"phase": Phase.WAITING_FOR_MEMBERS, "round": 4, "final_rounds": 4, "checkpoint_root": KEY}, JoinRefused),
        ({"phase": Phase.FINISHED, "round": 4, "final_rounds": 4}, RunFinished),
    ],
    ids=[
        "waiting",
        "first round",
        "after void rounds",
        "after the first that counts",
        "with a new model",
        "later",
        "with other weights than the model's",
        "after a checkpoint",
        "finished",
    ],
)
def test_a_node_is_told_at_once_whether_it_comes_in_time(fields: dict[str, Any], error: type[Exception] | None) -> None:
    run = pulse_of(**{"phase": Phase.WAITING_FOR_MEMBERS, **fields}).run
    if error is None:
        check_in_time(run, Path("model"))
        return
    with pytest.raises(error, match="finished after 4 rounds" if error is RunFinished else "since round 0") as said:
        check_in_time(run, Path("model"))
    assert exit_for(said.value) is (Exit.RUN_FINISHED if error is RunFinished else Exit.JOIN_REFUSED)
