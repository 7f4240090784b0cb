from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psyche_node.cli import app
from psyche_node.exits import Exit, exit_for
from psyche_node.node.folder import FolderInUse, held, keep_for_run

HOLD = """
import signal, sys
from pathlib import Path
from psyche_node.node.folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_what_another_run_has_left_in_a_folder_is_put_aside(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"

    def trained(words: str) -> None:
        checkpoint.mkdir()
        (checkpoint / "README.md").write_text(words)

    keep_for_run(tmp_path, "first-run-address")
    trained("first")
    keep_for_run(tmp_path, "first-run-address")
    assert checkpoint.exists(), "it is that of the same run"
    keep_for_run(tmp_path, "second-run-address")
    assert not checkpoint.exists()
    trained("second")
    keep_for_run(tmp_path, "first-run-address")
    trained("first again")
    keep_for_run(tmp_path, "second-run-address")
    kept = sorted((path / "README.md").read_text() for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["first", "first again", "second"]


def test_a_folder_has_one_process_and_the_error_names_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "new")], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(
            FolderInUse, match=rf"new is in use by another node, process {other.pid}:.*--folder"
        ) as said:
            held(tmp_path / "new").__enter__()
        assert exit_for(said.value) is Exit.FOLDER_IN_USE
        # However it ends, the folder is free.
        other.send_signal(signal.SIGKILL)
        other.wait()
        with held(tmp_path / "new"):
            assert (tmp_path / "new" / "lock").read_text() == f"{os.getpid()}\n"
            assert stat.S_IMODE((tmp_path / "new" / "lock").stat().st_mode) == 0o600


def test_a_folder_is_free_after_an_error_and_no_child_keeps_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    with contextlib.suppress(RuntimeError), held(tmp_path):
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        raise RuntimeError
    with held(tmp_path):
        child.communicate(b"\n")


def test_a_lock_that_says_nothing_yet_is_one_all_the_same(tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(FolderInUse, match="does not say yet"):
            held(tmp_path).__enter__()


def test_a_second_daemon_of_a_folder_ends_with_the_code_for_it(tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).touch()
    flags = ["--run", "1" * 32, "--rpc", "http://127.0.0.1:1", "--model", str(tmp_path), "--data", str(tmp_path)]
    with held(tmp_path / "node"):
        result = CliRunner().invoke(app, ["run", *flags, "--folder", str(tmp_path / "node")])
    assert result.exit_code == Exit.FOLDER_IN_USE, result.output
    assert not (tmp_path / "node" / "wallet.json").exists()
