"""A run of nodes that hold the model in different ways: one process, FSDP2 over two, tensor parallelism over two."""

from __future__ import annotations

import pytest
from e2e_harness import Simulate, journal

pytestmark = pytest.mark.e2e
ROUNDS = 3


def test_replicas_on_every_layout_are_identical_after_every_round(simulate: Simulate) -> None:
    layouts = ("--ranks", "1", "--ranks", "2", "--ranks", "2/2")
    finished = simulate("--nodes", "3", "--rounds", str(ROUNDS), "--check-every", "1", *layouts)
    assert finished.code == 0, finished.text
    result = finished.result
    assert result.rounds == ROUNDS
    assert result.replicas_identical
    assert len(result.checks) == ROUNDS
    for check in result.checks:
        assert len(check.weights_sha256) == 3
        assert len(set(check.weights_sha256.values())) == 1
    assert len({check.weights_sha256["node-0"] for check in result.checks}) == ROUNDS
    devices = [journal(finished.out, f"node-{index}")[0]["device"][:4] for index in range(3)]
    assert devices == ["CPU,", "2 x ", "2 x "]
    assert all(node.updates_included == ROUNDS for node in result.nodes)
    logs = [finished.logs(f"node-{index}") for index in range(3)]
    assert "FSDP2 over 2 ranks" in logs[1]
    assert "tensor parallel over 2 ranks" in logs[2]
