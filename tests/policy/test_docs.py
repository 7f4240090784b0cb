"""The documentation says what the code says: generated pages, links, decisions, exit codes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.jsonrpc import RpcError
from psyche_node import exits
from psyche_node.exits import Exit, exit_for
from psyche_node.ipc import Failure, RemoteFailure
from psyche_node.network.ports import PortUnavailable
from psyche_node.training.errors import ModelError, OutOfMemory, RankFailed

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
DECISION_PARTS = ("## Context", "## Decision", "## Consequence", "## What would change it")


def test_generated_pages_are_current(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=root, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dependency_has_its_reason(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    declared = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in wanted}
    page = (root / "docs" / "decisions" / "dependencies.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9._-]+)` \| (.+?) \|", page, flags=re.MULTILINE))
    assert sorted(declared - rows.keys()) == [], "declared in pyproject.toml, without a line in dependencies.md"
    assert sorted(rows.keys() - declared) == [], "in dependencies.md, but no longer declared"
    assert [name for name, reason in rows.items() if len(reason.split()) < 4] == []


def test_links_lead_somewhere(files: tuple[Path, ...], root: Path) -> None:
    broken = []
    for path in files:
        if path.suffix != ".md":
            continue
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target) or target.startswith("#"):
                continue
            place = (path.parent / target.partition("#")[0]).resolve()
            if not place.exists():
                broken.append(f"{path.relative_to(root)}: {target}")
    assert not broken, "\n".join(broken)


def test_decisions_are_numbered_and_complete(root: Path) -> None:
    entries = sorted((root / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in entries] == list(range(1, len(entries) + 1))
    assert len(entries) >= 10
    for path in entries:
        text = path.read_text(encoding="utf-8")
        places = [text.find(part) for part in DECISION_PARTS]
        assert -1 not in places, f"{path.name} misses one of {DECISION_PARTS}"
        assert places == sorted(places), f"{path.name}: the parts are in another order"


def test_every_error_of_the_program_says_what_to_do() -> None:
    assert sorted(ERROR_TEXT) == sorted(ErrorCode)
    lacking = [code.name for code, text in ERROR_TEXT.items() if len(text.partition("; ")[2].split()) < 2]
    assert not lacking, "ERROR_TEXT: what it means; what to do"


def test_exit_codes_fit_their_ranges_and_the_shell() -> None:
    ends = [end for first, last, _ in exits.RANGES for end in (first, last)]
    assert ends == sorted(ends), "ranges overlap"
    for code in Exit:
        inside = [name for first, last, name in exits.RANGES if first <= code <= last]
        assert len(inside) == 1, code
        assert 0 <= code < 126 or code == Exit.INTERRUPTED, f"{code!r} is the shell's"
        assert len(code.meaning.split()) > 3
        assert code.resolve.strip()


@pytest.mark.parametrize("name", sorted(exits._EXITS))
def test_every_class_with_an_exit_code_exists(name: str) -> None:
    module, _, class_ = name.rpartition(".")
    error = getattr(importlib.import_module(module), class_)
    assert issubclass(error, BaseException)


def test_exit_for() -> None:
    class Weird(FileNotFoundError):
        pass

    assert exit_for(Weird("gone")) is Exit.FILES, "the nearest known class counts"
    assert exit_for(TimeoutError()) is Exit.UNEXPECTED, "a timeout is an OSError to Python, not to an operator"
    assert exit_for(KeyError("x")) is Exit.UNEXPECTED
    assert exit_for(KeyboardInterrupt()) is Exit.INTERRUPTED
    assert exit_for(ExceptionGroup("tasks", [ExceptionGroup("more", [PermissionError()])])) is Exit.FILES
    assert exit_for(click.UsageError("no such option")) is Exit.UNEXPECTED, "its exit_code is a number of its own"
    assert exit_for(RankFailed("rank 1 of 2: ValueError: x")) is Exit.TRAINING
    assert exit_for(RpcError("getHealth", -32601, "Method not found")) is Exit.RPC_REFUSED


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("gone"), Exit.FILES),
        (PermissionError("not yours"), Exit.FILES),
        (ModelError("no config.json"), Exit.MODEL),
        (OutOfMemory("too large"), Exit.TRAINING),
        (RankFailed("rank 1 of 2: FileNotFoundError: gone", Exit.FILES), Exit.FILES),
        (RemoteFailure("network", Failure.of("Configure", PortUnavailable("x"))), Exit.NETWORK),
        (KeyError("x"), Exit.CHILD_PROCESS),
        (TimeoutError(), Exit.CHILD_PROCESS),
    ],
)
def test_what_another_process_reports_ends_with_the_code_that_it_has_there(error: Exception, code: Exit) -> None:
    assert exit_for(RemoteFailure("training", Failure.of("Load", error))) is code
