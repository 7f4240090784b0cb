"""The generated wire code is what ``proto/`` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_checked_in_wire_code_is_current() -> None:
    generate = Path(__file__).parents[2] / "proto" / "generate.py"
    done = subprocess.run([sys.executable, str(generate), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
