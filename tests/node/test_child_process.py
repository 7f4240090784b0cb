from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import psutil
import pytest
from node_stage import run_async

from psyche_node.node import processes
from psyche_node.node.processes import Child

# Says that it has started, then ignores both the end of its socket and SIGTERM.
STUBBORN = """
import signal, socket, sys, time
from psyche_node.ipc import Ok, encode_frame
signal.signal(signal.SIGTERM, signal.SIG_IGN)
socket.socket(fileno=int(sys.argv[2])).sendall(encode_frame(0, Ok()))
while True:
    time.sleep(60)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "child_under_test.py"


async def started() -> Child:
    up = asyncio.Event()
    child = await Child.start("test", "child_under_test", lambda message: up.set())
    await up.wait()
    return child


def test_child_that_does_not_end_is_killed(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.write_text(STUBBORN)
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.05)

    async def test() -> None:
        child = await started()
        await child.stop()
        assert not psutil.pid_exists(child.process.pid)

    run_async(test())


def test_child_that_is_still_being_started_is_not_waited_for(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch, or loading 70 GB, takes longer than anybody waits who stops a node."""
    module.write_text("import time\nwhile True:\n    time.sleep(60)\n")
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 3600.0)

    async def test() -> None:
        child = await Child.start("test", "child_under_test", lambda message: None)
        await child.stop()
        assert not psutil.pid_exists(child.process.pid)

    run_async(test())


def test_child_is_killed_at_once_when_its_end_is_cancelled(module: Path) -> None:
    module.write_text(STUBBORN)

    async def test() -> None:
        child = await started()
        stopping = asyncio.create_task(child.stop())
        while not child.endpoint.closed.is_set():
            await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert not psutil.pid_exists(child.process.pid)

    run_async(test())


@pytest.mark.parametrize(
    ("end", "level", "how"),
    [
        ("raise SystemExit(7)", "ERROR", "exit status 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "INFO", "killed by SIGTERM (it was asked to end)"),
    ],
    ids=["by itself", "by the signal that all get"],
)
def test_child_that_died_is_told_with_how_it_ended(
    module: Path, caplog: pytest.LogCaptureFixture, end: str, level: str, how: str
) -> None:
    module.write_text(end)

    async def test() -> None:
        child = await Child.start("training", "child_under_test", lambda message: None)
        await child.endpoint.closed.wait()
        with caplog.at_level(logging.INFO):
            await child.stop()
        said = [(one.levelname, one.message) for one in caplog.records]
        assert said == [(level, f"the training process had ended before: {how}")]

    run_async(test())
