"""A chain that the simulation did not start: only the RPC address differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_harness import Simulate

pytestmark = pytest.mark.e2e


def admin(*arguments: str) -> str:
    command = [sys.executable, "-m", "coordinator.admin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def test_run_on_a_chain_of_the_users_choice(simulate: Simulate, rpc: str, tmp_path: Path) -> None:
    wallet = tmp_path / "owner.json"
    admin("keys", "new", str(wallet))
    where = ("--rpc", rpc, "--wallet", str(wallet), "--slot-ms", "100")
    broke = simulate("--nodes", "2", "--rounds", "3", *where)
    assert broke.code == 70, broke.text
    assert "has 0 SOL" in broke.text
    admin("ledger", "airdrop", json.loads(admin("keys", "show", str(wallet), "--json"))["address"], "10", "--rpc", rpc)
    finished = simulate("--nodes", "2", "--rounds", "3", *where, "--out", str(tmp_path / "second"))
    assert finished.code == 0, finished.text
    report = json.loads((tmp_path / "second" / "report.json").read_text())
    assert report["replicas_identical"]
    assert report["ledger"]["rpc"] == rpc
    shown = json.loads(admin("run", "show", report["run_id"], "--rpc", rpc, "--json"))
    assert len(shown["members"]) == 2
