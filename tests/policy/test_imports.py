"""Which way the dependencies point (docs/decisions/, "packages"): the rules that keep the parts usable alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("optimizer", "coordinator", "psyche_node")
OPTIMIZER_MAY = {"torch", "numpy", "optimizer"}
FORBIDDEN = {
    "coordinator": ("torch", "transformers", "optimizer", "psyche_node"),
    "optimizer": ("coordinator", "psyche_node"),
    "psyche_node/network": ("psyche_node.data", "psyche_node.training", "torch"),
    "psyche_node/data": ("psyche_node.network", "psyche_node.training", "torch"),
    "psyche_node/training": ("psyche_node.network", "psyche_node.data", "psyche_node.evaluation"),
    "psyche_node/evaluation": ("psyche_node.network", "psyche_node.node", "psyche_node.sim", "coordinator"),
}
WORDS = "coordinator.wording"
"""What validation found, put into words; it imports nothing of this project, and anybody may use it."""
IMPORT_NAMES = {
    "protobuf": "google",
    "grpcio": "grpc",
    "grpcio-tools": "grpc_tools",
    "pyelftools": "elftools",
    "typer": "typer",
    "pytest-timeout": "pytest_timeout",
}

COMPANIONS = {"markupsafe": "jinja2", "multiaddr": "libp2p", "base58": "libp2p", "httpx2": "solana", "triton": "torch"}
"""Packages that a declared one brings along and whose types are its own interface (docs/decisions/dependencies.md)."""


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import, those inside functions included.

    ``from a.b import c`` yields ``a.b.c``: c may be a module, and a prefix rule does not mind if it is not.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + package]
                base = ".".join([*kept, node.module] if node.module else kept)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(path: Path, root: Path) -> list[tuple[int, str]]:
    package = path.name == "__init__.py"
    return list(imports(path.read_text(encoding="utf-8"), module_of(path, root), package=package))


def test_the_reader_of_imports_sees_every_form() -> None:
    source = "import torch.nn as n\nfrom psyche_node import data\nfrom . import wire\n"
    source += "def late():\n    from ..data.packed import X\n"
    assert [name for _, name in imports(source, "psyche_node.network.node")] == [
        "torch.nn",
        "psyche_node.data",
        "psyche_node.network.wire",
        "psyche_node.data.packed.X",
    ]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_directions(folder: str, python_files: tuple[Path, ...], root: Path) -> None:
    inside = [path for path in python_files if path.is_relative_to(root / folder)]
    assert inside, f"{folder} is empty"
    wrong = [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in inside
        for line, name in imports_of(path, root)
        if any(is_inside(name, package) for package in FORBIDDEN[folder])
        and not (is_inside(name, WORDS) and folder.startswith("psyche_node"))
    ]
    assert not wrong, "\n".join(wrong)


def test_optimizer_needs_torch_and_numpy_only(python_files: tuple[Path, ...], root: Path) -> None:
    companions = {name for name, owner in COMPANIONS.items() if owner in OPTIMIZER_MAY}
    allowed = OPTIMIZER_MAY | companions | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in python_files
        if path.is_relative_to(root / "optimizer")
        for line, name in imports_of(path, root)
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_do_not_import_tests(python_files: tuple[Path, ...], root: Path) -> None:
    wrong = [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path in python_files
        if path.relative_to(root).parts[0] in PACKAGES
        for line, name in imports_of(path, root)
        if name.partition(".")[0] in ("tests", "pytest", "hypothesis", "benchmarks")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_import_is_a_declared_dependency(python_files: tuple[Path, ...], root: Path) -> None:
    """What is imported is in pyproject.toml by its own name, not by the luck of being somebody else's dependency."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in wanted}
    assert set(COMPANIONS.values()) <= names
    known = set(COMPANIONS) | {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    wrong = sorted(
        {
            f"{path.relative_to(root)}:{line} imports {name}"
            for path in python_files
            if path.relative_to(root).parts[0] in PACKAGES
            for line, name in imports_of(path, root)
            if (top := name.partition(".")[0]) not in known
            and top not in sys.stdlib_module_names
            and top not in PACKAGES
        }
    )
    assert not wrong, "add to pyproject.toml and docs/decisions/dependencies.md:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "modules",
    [
        "optimizer, optimizer.layout, optimizer.codec",
        "coordinator.client, coordinator.state, coordinator.instructions",
        "psyche_node.cli, psyche_node.exits, psyche_node.sim.cli, psyche_node.sim.report, psyche_node.sim.progress",
        "psyche_node.node.daemon",
        "psyche_node.network.store",
    ],
)
def test_these_do_not_load_torch(modules: str) -> None:
    """The supervisor, the commands and the network process stay small; only the training process holds torch."""
    code = f"import sys, {modules}\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr or f"{modules} loads torch"


@pytest.mark.parametrize("module", ["psyche_node.cli", "psyche_node.sim.cli", "coordinator.admin.app"])
def test_help_and_a_wrong_flag_wait_for_no_large_library(module: str) -> None:
    large = "{'torch', 'transformers', 'numpy', 'pyarrow', 'tokenizers', 'grpc', 'libp2p'}"
    code = f"import sys, {module}\nprint(*{large} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.split() == []
