"""Members without training on one ledger: what a round costs them, and that they get through faults of the chain."""

from __future__ import annotations

import asyncio

import pytest
from many_clients import BUDGET_BYTES, Setting, measure

FAULTS = {
    "slow, sent twice, reset, by a clock that is wrong": (
        "latency_ms=40, jitter_ms=40, duplicate=0.5, reset=0.03, reset_after=0.03, clock_stopped=true",
        "",
    ),
    "lost, and too many requests": ("lose=0.3, requests_per_second=40",),
    "websockets cut and mute": ("socket_seconds=1, refuse_sockets=0.3, mute=0.5",),
    "behind the other, and the chain stands still": ("stale=0.5, stale_slots=30, halt_slot=90, halt_seconds=1", ""),
}


def test_budgets_hold_with_a_dozen_members_of_whom_some_fall_silent() -> None:
    measured = asyncio.run(asyncio.wait_for(measure(Setting(12, 4, 50, 30, dead=2)), 300))
    assert measured.rounds == 3
    assert measured.ticks_per_transition <= 2
    assert measured.bytes_most < BUDGET_BYTES
    assert measured.void_rounds == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_gets_through(name: str) -> None:
    measured = asyncio.run(asyncio.wait_for(measure(Setting(5, 3, 50, 10, faults=FAULTS[name])), 300))
    assert measured.void_rounds == 0
    assert measured.ticks_per_transition <= 3
