"""The main job with real processes: three nodes train a few rounds through the on-chain coordinator."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_harness import Simulate, until

from coordinator.program import program_bytes
from coordinator.run_costs import LAMPORTS_PER_SIGNATURE, run_fees

pytestmark = pytest.mark.e2e
ROUNDS = 6


def admin(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "coordinator.admin", *arguments], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


def test_nodes_train_one_model_and_the_chain_tells_the_story(started, tmp_path: Path) -> None:
    process, out = started("--nodes", "3", "--rounds", str(ROUNDS), "--check-every", "1", "--hold")
    until(lambda: (out / "report.html").exists() or process.poll() is not None, "the report", 240)
    assert process.poll() is None, process.communicate()[0]
    report = json.loads((out / "report.json").read_text())

    # Every replica, with its own thread count and micro-batch, has the same bytes after every round.
    assert report["outcome"] == "finished"
    assert report["rounds"] == ROUNDS
    assert len(report["checks"]) == ROUNDS
    for check in report["checks"]:
        assert len(check["weights_sha256"]) == 3
        assert len(set(check["weights_sha256"].values())) == 1
    assert len({check["weights_sha256"]["node-0"] for check in report["checks"]}) == ROUNDS
    assert len({node["weights_sha256"] for node in report["nodes"]}) == 1
    assert len({node["fingerprint"] for node in report["nodes"]}) == 1
    assert [(node["exit"], node["exit_code"]) for node in report["nodes"]] == [("finished", 0)] * 3
    assert report["loss"][-1] < report["loss"][0]
    assert report["bytes_sent_total"] < report["dense_bytes_total"] / 10
    assert (out / "report.html").read_text().startswith("<!doctype html>")

    # The same, read from the ledger alone.
    run, rpc = report["ledger"]["run_address"], report["ledger"]["rpc"]
    shown = json.loads(admin("run", "show", run, "--rpc", rpc, "--json"))
    text = admin("run", "show", run, "--rpc", rpc)
    assert "FINISHED" in json.dumps(shown).upper()
    assert "FINISHED" in text.upper()
    credits = {member["wallet"]: member["credit"] for member in shown["members"]}
    assert credits == {node["wallet"]: node["credit"] for node in report["nodes"]}
    assert sum(credits.values()) == sum(record["tokens"] for record in report["timeline"])

    # Fees are those that a plan foretells; the owner's are the writes of the program, and a few more.
    planned = run_fees(3, ROUNDS, ROUNDS).whole_run // LAMPORTS_PER_SIGNATURE
    writes = len(program_bytes()) // 900
    assert abs(report["ledger"]["lamports"] // LAMPORTS_PER_SIGNATURE - planned - writes) <= 15

    # The model is a Hugging Face folder that another process loads and talks to.
    model = Path(report["checkpoint"])
    loads = "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; " + (
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1]); "
        "print(type(m).__name__, m.config.attention_dropout, m.config.residual_dropout, len(t))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", loads, str(model)], capture_output=True, text=True, timeout=240, check=True
    )
    assert re.match(r"SeedOssForCausalLM 0\.0 0\.0 \d+", loaded.stdout)
    chat = [sys.executable, "-m", "psyche_node.sim.cli", "chat", str(model), "What does os.path.join do?"]
    subprocess.run(chat, capture_output=True, text=True, timeout=240, check=True)

    process.terminate()
    assert process.wait(240) == 130


def test_killed_node_does_not_stop_the_others(simulate: Simulate) -> None:
    finished = simulate("--nodes", "4", "--rounds", "8", "--overlap", "1", "--kill", "2@3", "--check-every", "2")
    assert finished.code == 0, finished.text
    result = finished.result
    killed = next(node for node in result.nodes if node.name == "node-2")
    others = [node for node in result.nodes if node.name != "node-2"]
    assert (killed.exit, killed.status) == ("killed", "dropped")
    assert [node.exit for node in others] == ["finished"] * 3
    assert result.replicas_identical
    assert len({node.weights_sha256 for node in others}) == 1
    assert result.rounds == 8
    assert not result.void_rounds
    # Its share was trained by the others: after it was dropped, every round is complete again.
    assert all(len(record.members) == 3 for record in result.timeline[-2:])


def test_adversaries_are_refused_and_the_run_matches(simulate: Simulate) -> None:
    finished = simulate(
        *("--nodes", "3", "--rounds", "5", "--check-every", "1"),
        *("--adversary", "tamper", "--adversary", "length", "--adversary", "outsider"),
    )
    assert finished.code == 0, finished.text
    result = finished.result
    by_fault = {node.fault: node for node in result.nodes if node.fault}
    honest = [node for node in result.nodes if node.fault is None]
    assert by_fault["tamper"].updates_included == 0
    assert by_fault["length"].updates_included == 0
    assert by_fault["outsider"].slot is None
    # The round in which both adversaries are dropped lacks two of its five witnesses: it is void, and requeued.
    assert len(result.void_rounds) <= 1
    assert {node.updates_included for node in honest} == {5 - len(result.void_rounds)}
    # The adversaries that follow the protocol otherwise apply what counts, too.
    assert result.replicas_identical
    assert by_fault["tamper"].weights_sha256 == honest[0].weights_sha256
    logs = " ".join(finished.logs(node.name) for node in honest)
    shorter = result.update_bytes - 7
    assert f"{result.update_bytes} bytes were committed to, and the digest is that of {shorter} bytes" in logs
    assert by_fault["length"].node_id in logs
    assert by_fault["tamper"].node_id in logs
    assert by_fault["outsider"].node_id in logs
