"""What the documentation tells people to type: commands, flags and settings files are real."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from coordinator.admin import app as admin
from coordinator.ledger.cli import app as ledger
from coordinator.recipes import load_recipe
from coordinator.run_config import RunSettings
from psyche_node.cli import app as node
from psyche_node.exits import Exit
from psyche_node.node.config import NodeConfig
from psyche_node.sim.cli import app as sim

APPS: dict[str, Typer] = {"psyche-admin": admin, "psyche-ledger": ledger, "psyche-node": node, "psyche-sim": sim}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(files: tuple[Path, ...], root: Path) -> list[tuple[str, str, str]]:
    """(page, language, text) of every fenced block of the documentation."""
    pages = [path for path in files if path.suffix == ".md" and "decisions" not in path.parts]
    return [(page.relative_to(root).as_posix(), *found) for page in pages for found in FENCE.findall(page.read_text())]


def commands(text: str) -> list[list[str]]:
    """The command lines of a block that start one of the project's commands or make, split as a shell would."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        words = (
            shlex.split(line.removeprefix("$ "), comments=True) if "'" not in line or line.count("'") % 2 == 0 else []
        )
        if words and (Path(words[0]).name in APPS or words[0] == "make"):
            lines.append([Path(words[0]).name, *words[1:]])
    return lines


def problem(words: list[str], targets: set[str]) -> str | None:
    if words[0] == "make":
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no target {unknown[0]}" if unknown else None
    # With --help at the end a command is parsed and not run: an unknown flag or subcommand fails before.
    done = CliRunner().invoke(APPS[words[0]], [*words[1:], "--help"])
    return None if done.exit_code == 0 else done.output.strip()


def test_the_check_knows_a_wrong_command() -> None:
    assert problem(["psyche-sim", "--nodes", "4"], set()) is None
    assert problem(["psyche-sim", "--no-such-flag"], set()) is not None
    assert problem(["psyche-admin", "run", "vanish"], set()) is not None
    assert problem(["make", "demo"], {"demo"}) is None
    assert problem(["make", "tea"], {"demo"}) is not None


def test_documented_commands_exist(files: tuple[Path, ...], root: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    found = [(page, words) for page, _, text in blocks(files, root) for words in commands(text)]
    assert len(found) >= 10, "the documentation shows no commands?"
    wrong = [f"{page}: {shlex.join(words)}\n  {why}" for page, words in found if (why := problem(words, targets))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("page", "model"), [("docs/operators.md", NodeConfig), ("docs/run-owners.md", RunSettings)])
def test_documented_settings_are_valid(
    page: str, model: type[NodeConfig | RunSettings], files: tuple[Path, ...], root: Path
) -> None:
    found = [text for name, language, text in blocks(files, root) if name == page and language == "toml"]
    assert found
    for text in found:
        values = tomllib.loads(text)
        if "run" in values:
            values["run"] = "1" * 32
        if over := re.search(r"--recipe (\S+)", text):
            values = with_recipe(values, over[1])
        model.model_validate(values)


def with_recipe(values: dict[str, Any], name: str) -> dict[str, Any]:
    """What a file over a recipe makes, with a run's name and what the folders would give."""
    folders = dict.fromkeys(("model_root", "layout_digest", "data_manifest"), "00" * 32)
    recipe = load_recipe(name).settings()
    terms = recipe["terms"] | values["terms"] | folders | {"samples": 1, "update_bytes": 1}
    return {"run_id": "x", "limits": recipe["limits"] | values["limits"], "terms": terms}


def test_restarts_are_prevented_by_codes_that_exist(root: Path) -> None:
    line = re.search(r"^RestartPreventExitStatus=(.*)$", (root / "docs" / "operators.md").read_text(), re.MULTILINE)
    assert line
    assert {int(code) for code in line.group(1).split()} <= {code.value for code in Exit}
