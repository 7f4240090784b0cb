"""SIGTERM and Ctrl-C end a node with 130 and without a traceback, whenever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from psyche_node.commands.interrupts import Interrupts
from psyche_node.exits import Exit

ROOT = Path(__file__).parents[2]
# Stands in for a library that takes long to import.
SLOW = "import time\nprint('importing', flush=True)\nwhile True:\n    time.sleep(60)\n"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Whoever runs the tests in the background of a script has Ctrl-C ignored, and so have the processes started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("library", ["typer", "solders"], ids=["its commands", "the node"])
def test_whoever_is_still_importing_can_be_stopped(tmp_path: Path, library: str, number: signal.Signals) -> None:
    (tmp_path / f"{library}.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_node", "run", "--folder", "node"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Exit.INTERRUPTED, errors
    assert "Traceback" not in errors


def test_a_rank_that_torchrun_ends_is_ended_by_the_kernel(tmp_path: Path) -> None:
    """It may be in an exchange with ranks that are gone, which no handler in Python interrupts."""
    (tmp_path / "torch.py").write_text(SLOW)
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "a"}
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_node", "run"],
        env={**os.environ, **torchrun, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_the_first_raises_and_no_other_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupts = Interrupts()
        with pytest.raises(KeyboardInterrupt), interrupts.heard():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_every_one_is_a_call_where_the_command_says_what_to_do() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    calls: list[None] = []
    interrupts = Interrupts()
    with interrupts.heard():
        with interrupts.call(lambda: calls.append(None)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        interrupts.asked = False
    assert len(calls) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
