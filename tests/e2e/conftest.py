"""Real processes: each test starts `psyche-sim` as a user would, and nothing of it may be left at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import write_chat
from e2e_harness import Finished, Simulate, environment, processes_of, sim_command, until

from psyche_node.sim.prepare import prepare as prepare_run
from psyche_node.sim.settings import Prepared, SimSettings


@pytest.fixture
def rpc() -> Iterator[str]:
    """The address of a chain that the test has started itself."""
    command = [sys.executable, "-m", "coordinator.ledger", "run", "--port", "0", "--slot-ms", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ledger:
        assert ledger.stdout is not None
        yield json.loads(ledger.stdout.readline())["rpc"]
        ledger.terminate()


@pytest.fixture
def simulate(tmp_path: Path) -> Iterator[Simulate]:
    """Run `psyche-sim` with these flags to its end; nothing of it may be left then."""
    out = tmp_path / "sim"

    def run(*arguments: str, timeout: float = 540) -> Finished:
        done = subprocess.run(
            sim_command(out, *arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env=environment(out),
        )
        return Finished(out, done.returncode, done.stdout + done.stderr)

    yield run
    assert processes_of(out) == []


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Start `psyche-sim` with these flags; the test decides how it ends."""
    out = tmp_path / "sim"
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            sim_command(out, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
            env=environment(out),
            start_new_session=True,
        )
        running.append(process)
        return process, out

    yield start
    for process in running:
        process.kill()
        process.communicate()
    until(lambda: processes_of(out) == [], "the end of every process of the simulation", 240)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """A model that has learned nothing, and data, for runs of daemons."""
    write_chat(tmp_path / "chat.jsonl", "two")
    settings = SimSettings(out=tmp_path, data=str(tmp_path / "chat.jsonl"))
    return prepare_run(settings, tmp_path / "cache")
