"""A class of errors that nobody has decided about would end a command as something unforeseen."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.admin.exits import AdminExit
from coordinator.admin.failures import AdminError, status_of
from psyche_node import exits
from psyche_node.exits import Exit

# Module, and what is raised and caught by the process that it belongs to: no command ends with these.
INSIDE = {
    "coordinator.jsonrpc": "AttemptFailed Unusable",
    "coordinator.ledger.encoding": "UnsupportedEncoding",
    "coordinator.ledger.sanitize": "Refused",
    "coordinator.ledger.params": "RpcError",
    "coordinator.ledger.snapshot": "Damaged",
    "optimizer.errors": "MalformedUpdate",
    "optimizer.layout": "LayoutError",
    "psyche_node.network.bulk.client": "WrongNode",
    "psyche_node.network.bulk.frames": "BadFrame",
    "psyche_node.network.bulk.secure": "Broken",
    "psyche_node.network.certificates": "BadCertificate ExpiredCertificate",
    "psyche_node.network.download": "BadBytes FalseCommitment NothingYet",
    "psyche_node.network.gate": "Exceeded",
    "psyche_node.network.guard": "NotAdmitted",
    "psyche_node.network.health": "PartDied",
    "psyche_node.network.links": "CallFailed",
    "psyche_node.network.nat.rendezvous": "Refused",
    "psyche_node.network.sending": "Refused",
    "psyche_node.network.statements": "Malformed",
    "psyche_node.serving.errors": "ApiError",
    "psyche_node.sim.processes": "ProcessEnded",
}
# Commands whose exit codes are their own: psyche-ledger (docs/ledger.md), and the build of the program.
ELSEWHERE = {
    "coordinator.ledger.cli": "CannotListen",
    "coordinator.ledger.faults": "BadFaults",
    "coordinator.ledger.store": "StoreError",
    "coordinator.toolchain.build": "BuildError",
    "coordinator.toolchain.elf": "LinkError",
}


@pytest.fixture(scope="module")
def errors(root: Path) -> set[type[Exception]]:
    """Every public class of errors of the three packages."""
    return {error for package in ("coordinator", "optimizer", "psyche_node") for error in _errors_of(root, package)}


def _errors_of(root: Path, package: str) -> Iterator[type[Exception]]:
    for path in sorted((root / package).rglob("*.py")):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        names = [node.name for node in classes if node.bases and not node.name.startswith("_")]
        if not names:
            continue
        parts = path.relative_to(root).with_suffix("").parts
        module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        found = [getattr(module, name, None) for name in names]
        yield from (one for one in found if isinstance(one, type) and issubclass(one, Exception))


def _is_decided(error: type[Exception]) -> bool:
    names = [f"{one.__module__}.{one.__qualname__}" for one in error.__mro__ if one.__module__ != "builtins"]
    return any(name in exits._EXITS for name in names)


def test_every_error_has_an_exit_code(errors: set[type[Exception]]) -> None:
    assert len(errors) > 60
    apart = {f"{module}.{name}" for table in (INSIDE, ELSEWHERE) for module in table for name in table[module].split()}
    undecided = {f"{one.__module__}.{one.__qualname__}" for one in errors if not _is_decided(one)}
    undecided -= {f"{one.__module__}.{one.__qualname__}" for one in errors if issubclass(one, AdminError)}
    assert undecided - apart == set(), "give it an exit code, or say here why it needs none"
    assert apart - undecided == set(), "no error any more, or one that has an exit code"


def test_what_the_chain_raises_is_known_to_psyche_admin(errors: set[type[Exception]]) -> None:
    """Of the coordinator's errors, those that end psyche-node with a code end psyche-admin with one, too."""
    ours = {one for one in errors if one.__module__.startswith("coordinator.") and _is_decided(one)}
    assert len(ours) > 12
    for one in ours:
        assert isinstance(status_of(one.__new__(one)), AdminExit), one


def test_operators_are_told_what_to_do_about_every_exit_code(root: Path) -> None:
    text = (root / "docs" / "operators.md").read_text(encoding="utf-8")
    table = text.partition("| code | how it ended | what to do next |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert all(len(row) == 3 and all(row) for row in rows)
    told = [int(code) for codes, *_ in rows for code in codes.split(",")]
    assert told == sorted(told)
    assert set(told) ^ {code.value for code in Exit} == set(), "not in the table, or no exit code any more"
