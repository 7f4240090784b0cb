"""What the tests of the network share: a quiet gRPC, and limits of time that tell no slow machine from a dead peer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import trio
from awake_clock import AwakeClock

# gRPC's C core prints what the tests provoke; the tests look at what the code under test says.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

PATIENCE = 60.0
# How long a node waits for a peer that is there. Tests of such a limit set it themselves.
LIMITS = (
    "asking.CALL_SECONDS",
    "bulk.client.CONNECT_SECONDS",
    "bulk.client.HANDSHAKE_SECONDS",
    "bulk.client.STALLED_SECONDS",
    "direct.SECONDS",
    "download.CALL_SECONDS",
    "links.PROBE_SECONDS",
    "links.PUSH_STALL_SECONDS",
    "nat.dialback.DIAL_SECONDS",
    "nat.puncher.OBSERVE_SECONDS",
    "nat.puncher.PUNCH_SECONDS",
    "nat.rendezvous.DIAL_SECONDS",
    "nat.rendezvous.SECONDS",
    "push.HEADER_SECONDS",
    "push.STREAM_SECONDS",
    "records.SECONDS",
    "spread.PUSH_SECONDS",
    "swarm.DIAL_SECONDS",
)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the nodes of the test's own process: a machine that stands still for seconds is not a peer that is gone."""
    for name in LIMITS:
        module, _, constant = f"psyche_node.network.{name}".rpartition(".")
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], constant, PATIENCE)
    run = trio.run

    def awake(function: Callable[..., Any], *arguments: Any) -> Any:
        return run(function, *arguments, clock=AwakeClock())

    monkeypatch.setattr(trio, "run", awake)
