"""The demo's data set: a chat about the standard library, from the documentation that every CPython carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from psyche_node.data.errors import DataError
from psyche_node.data.files import write_atomically

WALK = Path(__file__).with_name("stdlib_walk.py")
_WALK_SECONDS = 120


@dataclass(frozen=True, slots=True)
class ChatCounts:
    """What ``build_stdlib_chat`` wrote: samples (lines), and documented objects by kind (module, class, method...)."""

    samples: int
    objects: dict[str, int]


def build_stdlib_chat(path: Path) -> ChatCounts:
    """Write a ``messages`` JSONL file about this interpreter's standard library to ``path``.

    The same interpreter always gives the same bytes. Each line also carries ``group``, the documented object's name, so
    that all questions about one object fall on the same side of the held-out split. Takes about a second.

    Raises:
        DataError: the walk failed, or found next to nothing (an interpreter run with docstrings stripped).
    """
    # Isolated and without site-packages: only the standard library can be imported, whatever lies in this folder.
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(WALK)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_WALK_SECONDS, check=True
        )
        objects = json.loads(done.stderr.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, IndexError, ValueError) as error:
        detail = getattr(error, "stderr", b"") or b""
        raise DataError(
            f"reading the standard library's documentation with {sys.executable} failed: {error} "
            f"{detail.decode(errors='replace')[-400:]}. Pass your own data instead, as JSONL"
        ) from error
    samples = done.stdout.count(b"\n")
    if samples < 1000:
        raise DataError(
            f"{sys.executable} carries documentation for only {samples} questions; its docstrings seem to be stripped. "
            "Use another Python, or pass your own data as JSONL"
        )
    write_atomically(path, done.stdout)
    return ChatCounts(samples=samples, objects=objects)
