"""Runs of real `psyche-node run` daemons, as an owner and operators start them: the program, the run, the nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from psyche_node.sim.settings import Prepared, SimSettings


def admin(*arguments: str) -> Any:
    """What `psyche-admin` with these arguments prints as JSON. Raises CalledProcessError."""
    command = [sys.executable, "-m", "coordinator.admin", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout)


def write_chat(path: Path, word: str) -> None:
    """Write 200 samples to train on; others with another ``word``."""
    lines = [{"prompt": f"What is {n} and {word}?", "completion": f"It is {n + 2}, no less."} for n in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def create_run(prepared: Prepared, folder: Path, rpc: str, *, source: str = "", **limits: int) -> str:
    """Return the address of a run that waits for two members. Its owner is ``folder/owner.json``."""
    owner, where = str(folder / "owner.json"), ("--rpc", rpc)
    admin("keys", "new", owner)
    admin("ledger", "airdrop", owner, "20", *where)
    program = admin("program", "deploy", "--payer", owner, *where)["program"]
    named = {"model_root", "layout_digest", "data_manifest", "samples", "sequence_length", "update_bytes"}
    terms = prepared.model_dump(mode="json", include=named)
    terms |= {"data_source": source, "topk": SimSettings(out=folder).recipe.topk, "peak_lr": 0.002}
    limits = {"init_min_members": 2, "min_members": 2, "batch": 4, "rounds_per_epoch": 2, "total_rounds": 2, **limits}
    sets = [
        part
        for section, values in (("limits", limits), ("terms", terms))
        for key, value in values.items()
        for part in ("--set", f"{section}.{key}={json.dumps(value)}")
    ]
    created = admin("run", "create", "of-a-test", *sets, "--program", program, "--payer", owner, *where)
    return str(created["address"])


def node(run: str, rpc: str, folder: Path, model: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    """Start a daemon in a session of its own; its wallet is made and funded if ``folder`` is new."""
    if not folder.exists():
        admin("keys", "new", str(folder / "wallet.json"))
        admin("ledger", "airdrop", str(folder / "wallet.json"), "2", "--rpc", rpc)
    command = [sys.executable, "-m", "psyche_node.cli", "run", "--run", run, "--rpc", rpc, "--folder", str(folder)]
    command += ["--model", str(model), "--data", str(data), "--threads", "1", "--device", "cpu", *more]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, start_new_session=True
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a daemon and its processes, all at once, as a power cut does."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and what it started with it
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
