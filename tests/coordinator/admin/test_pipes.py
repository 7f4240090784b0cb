"""Output that nobody reads any more ends a command as it ends others: at once, and without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from coordinator.pipes import READER_GONE


def ended(module: str, *arguments: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and errors of a command whose output had a reader that is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as nobody:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "unbuffered"),
    [
        ("coordinator.admin", ("keys", "new", "wallet.json", "--json"), ""),
        ("coordinator.admin", ("keys", "new", "wallet.json"), "1"),
        ("coordinator.admin", ("run", "--help"), ""),
        ("coordinator.ledger", ("run", "--port", "0"), ""),
        ("psyche_node.cli", ("keys", "rotate", "--folder", "."), ""),
        ("psyche_node.cli", ("recipe", "show", "demo"), "1"),
        ("psyche_node.sim.cli", ("--help",), ""),
    ],
)
def test_a_closed_pipe(
    module: str, arguments: tuple[str, ...], unbuffered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[3]
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "PYTHONPATH": str(root)}
    assert ended(module, *arguments, environment=environment) == (READER_GONE, "")


def test_without_any_output_a_command_runs_all_the_same(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m coordinator.admin keys new wallet.json >&-"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "wallet.json").exists()
