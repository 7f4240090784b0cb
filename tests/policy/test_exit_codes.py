"""A class of errors that nobody has decided about would end a command as something unforeseen."""

from __future__ import annotations

import ast
import importlib
import re
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

# What takes part in a run, and so ends `psyche-node run`.
NODE = re.compile(
    r"psyche_node/(node|network|data|training)/|psyche_node/(identity|metrics)\.py"
    r"|coordinator/(chain|client|find_run|pulses|rpc|snapshot|transactions|wallet)\.py"
)
VERBS = (
    "add align ask change check choose convert copy fetch get give install leave look lower make mend move name open "
    "pass prepare put raise remove restore run save send set split start stop tokenize try upgrade use wait write"
)
REMEDY = re.compile(
    rf"(?i)(^|[.,;:?] (and |or )?|\n)(then |first )?({VERBS.replace(' ', '|')})\b"
    r"|is it |was it |\? *$|\bmust\b|known are|nothing (is wrong|to join)|psyche-admin"
)
# Said by code that was called wrongly: nobody who types anything can be told what to do.
BETWEEN_PARTS = (
    "an Ed25519 public key is",
    "a node key's seed is",
    "is not the PeerId of an Ed25519 key",
    "this client was opened without a run",
    "two entries of the member list",
    "blob {} of {} bytes {}",
    "the network process has no use for",
)


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


def _text(node: ast.expr) -> str | None:
    """A message as far as it is written there; None of one that comes from elsewhere whole, or ends so."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=[*values]) if values:
            ends_elsewhere = isinstance(values[-1], ast.FormattedValue)
            return None if ends_elsewhere else "".join(_text(one) or "{}" for one in values)
    return None


def _messages_by_code(root: Path) -> Iterator[tuple[Exit, str]]:
    codes = {name.rpartition(".")[2]: code for name, code in exits._EXITS.items() if not name.startswith("builtins.")}
    for path in sorted(root.rglob("*.py")):
        if not NODE.match(path.relative_to(root).as_posix()):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[*_, last]) if name in codes and (text := _text(last)):
                    yield codes[name], text


def test_what_says_itself_what_to_do_is_left_at_that_and_nothing_else(root: Path) -> None:
    """After the ends in SAID no advice follows: each of their messages has its own. Of the others, not all have one."""
    mute: dict[Exit, list[str]] = {}
    for code, text in _messages_by_code(root):
        said = REMEDY.search(text) or any(one in text for one in BETWEEN_PARTS)
        mute.setdefault(code, []).extend([] if said else [text])
    assert {code: texts for code, texts in mute.items() if code in exits.SAID and texts} == {}, "say what to do"
    assert [code for code, texts in mute.items() if code not in exits.SAID and not texts] == [], "put it into SAID"


def test_operators_are_told_what_to_do_about_every_exit_code(root: Path) -> None:
    text = (root / "docs" / "operators.md").read_text(encoding="utf-8")
    table = text.partition("| code | how it ended | what to do next |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    assert all(len(row) == 3 and all(row) for row in rows)
    told = [int(code) for codes, *_ in rows for code in codes.split(",")]
    assert told == sorted(told)
    assert set(told) ^ {code.value for code in Exit} == set(), "not in the table, or no exit code any more"
