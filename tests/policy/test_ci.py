"""The script that CI runs: it ends with pytest's closing line, and with the exit status of the tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("output", "make_status", "status", "last"),
    [
        ("== 41 passed, 1 skipped in 12.34s ==", 0, 0, "== 41 passed, 1 skipped in 12.34s =="),
        ("41 passed in 75.00s (0:01:15)\nmake: done", 0, 0, "41 passed in 75.00s (0:01:15)"),
        ("= 1 failed, 40 passed in 9.1s =\nmake: *** Error 1", 2, 2, "= 1 failed, 40 passed in 9.1s ="),
        ("ruff: E501", 2, 2, "the tests did not get to the end (exit status 2)"),
        ("nothing to be done for 'test'", 0, 1, "the tests did not get to the end (exit status 0)"),
    ],
)
def test_the_ci_script(output: str, make_status: int, status: int, last: str, tmp_path: Path, root: Path) -> None:
    make = tmp_path / "make"
    other = '[ "$*" = contract-surfpool ] && exit 0'
    make.write_text(f'#!/bin/sh\n{other}\n[ "$*" = test ] || exit 99\ncat <<"END"\n{output}\nEND\nexit {make_status}\n')
    make.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=500)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == last
