"""The page docs/two-daemons.md does what it says: its commands, one after the other, in an empty folder."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
PAGE = Path(__file__).resolve().parents[2] / "docs" / "two-daemons.md"
FENCE = re.compile(r"^```\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def free_ports() -> tuple[int, int]:
    """Return a port whose neighbour is free, too (the ledger's), and another one."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            third.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port, third.getsockname()[1]


def test_the_commands_of_the_page_start_two_daemons_that_train(tmp_path: Path) -> None:
    ledger, p2p = free_ports()
    script = "".join(FENCE.findall(PAGE.read_text())).replace("8899", str(ledger)).replace("4001", str(p2p))
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    # `wait` returns how the daemons ended: by a signal.
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script.replace("wait $A $B", "wait $A $B || test $? = 130")],
        cwd=tmp_path,
        env={**os.environ, **here},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = shell.communicate(timeout=540)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    logs = "\n".join((tmp_path / name).read_text() for name in ("a.log", "b.log") if (tmp_path / name).exists())
    assert shell.returncode == 0, said + logs
    trained = re.findall(r"^([ab])/journal\.jsonl:(\d+)$", said, flags=re.MULTILINE)
    assert [name for name, _ in trained] == ["a", "b"]
    assert all(int(rounds) >= 10 for _, rounds in trained), said
    sums = re.findall(r"^([0-9a-f]{64})  [ab]/checkpoint/model\.safetensors$", said, flags=re.MULTILINE)
    assert len(sums) == 2
    assert len(set(sums)) == 1
