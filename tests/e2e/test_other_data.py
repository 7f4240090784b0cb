"""Two real nodes and a run whose data is published: the one with other data does not join, and says what differs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from e2e_harness import until

from psyche_node.data import Manifest, prepare
from psyche_node.exits import Exit
from psyche_node.sim.prepare import prepare as prepare_run
from psyche_node.sim.settings import Prepared, SimSettings

pytestmark = pytest.mark.e2e


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    write_chat(tmp_path / "chat.jsonl", "two")
    settings = SimSettings(out=tmp_path, data=str(tmp_path / "chat.jsonl"))
    return prepare_run(settings, tmp_path / "cache")


@pytest.fixture
def published(prepared: Prepared) -> Iterator[str]:
    """The URL of the owner's prepared folder."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(prepared.data))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_chat(path: Path, word: str) -> None:
    lines = [{"prompt": f"What is {n} and {word}?", "completion": f"It is {n + 2}, no less."} for n in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def admin(*arguments: str) -> Any:
    command = [sys.executable, "-m", "coordinator.admin", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout)


def create_run(prepared: Prepared, source: str, folder: Path, rpc: str) -> str:
    """Return the address of a run that waits for two members."""
    owner, where = str(folder / "owner.json"), ("--rpc", rpc)
    admin("keys", "new", owner)
    admin("ledger", "airdrop", owner, "20", *where)
    program = admin("program", "deploy", "--payer", owner, *where)["program"]
    named = {"model_root", "layout_digest", "data_manifest", "samples", "sequence_length", "update_bytes"}
    terms = prepared.model_dump(mode="json", include=named)
    terms |= {"data_source": source, "topk": SimSettings(out=folder).recipe.topk, "peak_lr": 0.002}
    limits = {"init_min_members": 2, "min_members": 2, "batch": 4, "rounds_per_epoch": 2, "total_rounds": 2}
    sets = [
        part
        for section, values in (("limits", limits), ("terms", terms))
        for key, value in values.items()
        for part in ("--set", f"{section}.{key}={json.dumps(value)}")
    ]
    created = admin("run", "create", "other-data", *sets, "--program", program, "--payer", owner, *where)
    return str(created["address"])


def node(run: str, rpc: str, folder: Path, model: Path, data: Path) -> subprocess.Popen[str]:
    folder.mkdir()
    admin("keys", "new", str(folder / "wallet.json"))
    admin("ledger", "airdrop", str(folder / "wallet.json"), "2", "--rpc", rpc)
    command = [sys.executable, "-m", "psyche_node.cli", "run", "--run", run, "--rpc", rpc, "--folder", str(folder)]
    command += [
        "--model",
        str(model),
        "--data",
        str(data),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--listen",
        "127.0.0.1",
    ]
    ports = ["--p2p-port", "0", "--grpc-port", "0", "--bulk-port", "0"]
    return subprocess.Popen(
        [*command, *ports], stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, env={**os.environ}
    )


def test_a_node_with_other_data_does_not_join(prepared: Prepared, published: str, rpc: str, tmp_path: Path) -> None:
    run = create_run(prepared, published, tmp_path, rpc)
    write_chat(tmp_path / "other.jsonl", "three")
    theirs, other = Manifest.read(prepared.data), tmp_path / "other"
    mine = prepare(tmp_path / "other.jsonl", prepared.model, other, theirs.sequence_length)

    right = node(run, rpc, tmp_path / "right", prepared.model, prepared.data)
    try:
        wrong = node(run, rpc, tmp_path / "wrong", prepared.model, other)
        _, said = wrong.communicate(timeout=240)
        assert wrong.returncode == Exit.DATA_MISMATCH, said
        assert f"The first file that differs is {other / mine.train[0].file}" in said
        assert f"the run's is {theirs.train[0].file}" in said
        assert f"source file 1 of 1 has SHA-256 {mine.sources[0].sha256}" in said
        until(lambda: len(admin("run", "show", run, "--rpc", rpc)["members"]) == 1, "the node with the run's data", 240)
    finally:
        right.terminate()
        right.communicate(timeout=240)
