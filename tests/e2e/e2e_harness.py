"""What the end-to-end tests share: start `psyche-sim` as a user would, find its processes, read what it leaves."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from psyche_node.node.journal import JournalReader
from psyche_node.sim.result import RunResult, load_result

MARK = "PSYCHE_SIM_UNDER_TEST"
Simulate = Callable[..., "Finished"]


class Finished:
    """A simulation that has ended."""

    def __init__(self, out: Path, code: int, text: str) -> None:
        self.out, self.code, self.text = out, code, text

    @property
    def result(self) -> RunResult:
        return load_result(self.out / "report.json")

    def logs(self, name: str) -> str:
        return (self.out / "logs" / f"{name}.log").read_text()


def sim_command(out: Path, *arguments: str) -> list[str]:
    # Small rounds: what is tested is the network, not the model.
    small = ["--batch", "12", "--sequence-length", "128", "--evaluate-every", "0", "--out", str(out)]
    return [sys.executable, "-m", "psyche_node.sim.cli", *small, *arguments]


def environment(out: Path) -> dict[str, str]:
    """The environment that every process of the simulation in ``out`` inherits, which is how they are found again."""
    return {**os.environ, MARK: str(out)}


def processes_of(out: Path) -> list[psutil.Process]:
    """Every living process of this machine that descends from the simulation in ``out``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(out) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def journal(out: Path, node: str) -> list[dict[str, Any]]:
    """What a node has written so far."""
    return JournalReader(out / "nodes" / node / "journal.jsonl").read()


def until(condition: Callable[[], bool], what: str, timeout: float = 240) -> None:
    """Poll until ``condition`` holds; fail the test with ``what`` if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout:.0f} s"
        time.sleep(0.05)
