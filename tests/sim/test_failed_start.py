"""A start that fails says why; if it cannot, its logs stay."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.client import ChainUnavailable
from coordinator.wallet import create_keypair
from psyche_node.cli import app as node_app
from psyche_node.exits import Exit, exit_for
from psyche_node.node import daemon
from psyche_node.sim import cli
from psyche_node.sim.out import OutFolder
from psyche_node.sim.processes import Managed, ProcessEnded
from psyche_node.sim.run import run
from psyche_node.sim.settings import SimSettings
from psyche_node.sim.world import SimulationFailed, World

LINES = 40
CHATTY = f"import sys\nfor n in range({LINES}): print('line', n, file=sys.stderr)\n"


def first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, timeout: float = 90) -> ProcessEnded:
    """What is raised of a process that says much in its log, and then ends so."""
    (tmp_path / "some_part.py").write_text(CHATTY + ending)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def test() -> None:
        await Managed("part", "some_part", [], tmp_path / "part.log", pipe=True).first_line(timeout, "; wait")

    with pytest.raises(ProcessEnded) as caught:
        asyncio.run(test())
    return caught.value


@pytest.mark.parametrize(
    ("ending", "code", "explained"),
    [
        ("raise RuntimeError", 1, False),
        ("sys.exit(0)", 0, False),
        ("import os; os.kill(os.getpid(), 9)", -9, False),
        ("sys.exit(40)", 40, True),
    ],
)
def test_what_a_process_did_not_expect_is_told_with_much_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, code: int, explained: bool
) -> None:
    error = first_line(tmp_path, monkeypatch, ending)
    assert (error.code, error.explained) == (code, explained)
    assert ("line 0\n" in str(error)) is not explained
    assert f"line {LINES - 1}" in str(error)


def test_of_a_process_that_knew_the_log_is_not_shown_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = "".join(
        f"print({json.dumps(json.dumps({'level': level, 'msg': words}))}, file=sys.stderr)\n"
        for level, words in (("INFO", "again in 0.2 s"), ("WARNING", "a copy serves"))
    )
    error = first_line(tmp_path, monkeypatch, logged + "print('no such host', file=sys.stderr); sys.exit(40)")
    assert error.words.endswith("line 39\na copy serves\nno such host")


def test_time_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It may not even have begun by then: that is told with whatever its log has.
    error = first_line(tmp_path, monkeypatch, "import time; time.sleep(600)", timeout=0.25)
    assert "(part: ended, because it was not ready after 0.25 s; wait, log" in str(error)
    assert "SIGTERM" not in str(error)
    assert not error.explained


LOG = Path("x.log")


@pytest.mark.parametrize(
    ("error", "own_ledger", "code", "kept"),
    [
        (ProcessEnded("preparation", 40, LOG, "no such file"), True, Exit.DATA, False),
        (ProcessEnded("preparation", 1, LOG, "RuntimeError"), True, Exit.UNEXPECTED, True),
        (ProcessEnded("preparation", -9, LOG, ""), True, Exit.SIMULATION, True),
        (ProcessEnded("preparation", None, LOG, "", "too slow"), True, Exit.SIMULATION, True),
        (RuntimeError("what nobody thought of"), True, Exit.UNEXPECTED, True),
        (SimulationFailed("the wallet has too little"), False, Exit.SIMULATION, False),
        (ChainUnavailable("nobody answers"), False, Exit.CHAIN_UNAVAILABLE, False),
        (ChainUnavailable("nobody answers"), True, Exit.CHAIN_UNAVAILABLE, True),
    ],
)
def test_logs_of_a_failed_start_stay_unless_it_explains_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    own_ledger: bool,
    code: Exit,
    kept: bool,
) -> None:
    out = tmp_path / "out"

    async def fails(world: World, stack: object) -> None:
        if own_ledger:
            world.ledger = object()  # type: ignore[assignment]
        (out / "logs" / "prepare.log").touch()
        raise error

    monkeypatch.setattr(World, "_prepare_and_found", fails)
    assert asyncio.run(run(SimSettings(out=out), 0.0)) is code
    said = capsys.readouterr().out
    assert (out / "logs" / "prepare.log").exists() is kept
    assert out.exists() is kept
    if kept:
        assert ("x.log" if isinstance(error, ProcessEnded) else str(out / "logs")) in said
    else:
        assert str(out) not in said
        assert "x.log" not in said
        assert "exit status" not in said, "its own words say what was wrong"
        assert type(error).__name__ not in said


def test_a_folder_that_cannot_be_made_is_to_be_another_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(OSError, match=f"{out} cannot be made: .*; name another folder with --out") as found:
        OutFolder(out)
    assert exit_for(found.value) is Exit.FILES


def test_a_bad_task_file_is_found_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_simulate", lambda *_: pytest.fail("something was started"))
    monkeypatch.setattr(daemon, "Node", lambda *_: pytest.fail("a node was made"))
    task = tmp_path / "typo.json"
    task.write_text('{"kind": "loglikelihood", "promt": "", "target": "x", "data": "rows.jsonl"}')
    simulated = CliRunner().invoke(cli.app, ["--tasks", str(task), "--out", str(tmp_path / "out")])
    for folder, file in (("model", "config.json"), ("data", "manifest.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    create_keypair(tmp_path / "wallet.json")
    words = {
        "run": "demo",
        "rpc": "http://127.0.0.1:1",
        "folder": tmp_path / "node",
        "wallet": tmp_path / "wallet.json",
    }
    words |= {"model": tmp_path / "model", "data": tmp_path / "data", "tasks": task}
    taken_part = CliRunner().invoke(
        node_app, ["run", *(part for key, at in words.items() for part in (f"--{key}", str(at)))]
    )
    for done in (simulated, taken_part):
        assert done.exit_code == Exit.DATA, done.output
        assert f"{task} is not a task" in done.output
        assert "promt" in done.output
    assert not (tmp_path / "out").exists()
