"""Real nodes on a chain whose endpoints fail in every way: the run finishes and the replicas are identical.

Each fault alone, clients only: tests/coordinator/client/test_many_clients.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_harness import Simulate

pytestmark = pytest.mark.e2e

TINY = {
    "model_type": "seed_oss",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}
PREFERRED = (
    "lose=0.2, duplicate=0.2, latency_ms=40, jitter_ms=40, too_many=0.05, reset=0.03, reset_after=0.03, "
    "socket_seconds=4, refuse_sockets=0.2, mute=0.3, clock_skew_s=-86400"
)
SECOND = "stale=0.4, stale_slots=30, latency_ms=20, requests_per_second=50"


def test_replicas_are_identical_whatever_the_chains_endpoints_do(simulate: Simulate, tmp_path: Path) -> None:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(TINY))
    finished = simulate(
        *("--nodes", "5", "--rounds", "4", "--check-every", "1", "--model", str(model), "--topk", "64"),
        *("--batch", "10", "--sequence-length", "64"),
        *("--chain-fault", PREFERRED, "--chain-fault", SECOND),
    )
    assert finished.code == 0, finished.text
    result = finished.result
    assert result.outcome == "finished"
    assert result.rounds == 4
    assert result.replicas_identical
    assert len({node.weights_sha256 for node in result.nodes}) == 1
    assert [node.exit for node in result.nodes] == ["finished"] * 5
    # The faults were met, and a lost commitment was sent again.
    logs = "".join(finished.logs(node.name) for node in result.nodes)
    assert "too many requests (429)" in logs
    assert "WebSocket lost" in logs
