"""House rules over the whole tree: length of modules, nothing unfinished, no traces of the machine it was built on."""

from __future__ import annotations

import ast
import re
import stat
import subprocess
from pathlib import Path

import pytest

LONGEST = 600
CODE = {".py", ".c", ".h", ".js", ".css", ".jinja", ".proto"}
TEXT = CODE | {".md", ".toml", ".txt", ".cfg", ".json", ".yml", ".yaml", ".sh", ""}
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b|\bNotImplemented" r"Error\b")
# Homes, and the places where people and machines build. A service's /var/lib or /etc is not one of them.
MACHINE = re.compile(r"(?<![\w./-])/(?:home|Users|root|work|workspace|mnt|build|tmp/\w+)/[\w.-]")
BLANKET = re.compile(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:)|#\s*ruff:\s*noqa|#\s*mypy:\s*ignore-errors")


def lines_matching(paths: list[Path], pattern: re.Pattern[str], root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.fixture(scope="session")
def code_files(files: tuple[Path, ...], root: Path) -> list[Path]:
    wire = root / "psyche_node" / "network" / "wire"
    return [path for path in files if path.suffix in CODE and not path.is_relative_to(wire)]


def test_modules_are_short(code_files: list[Path], root: Path) -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in code_files}
    long = [f"{path.relative_to(root)}: {count} lines" for path, count in lengths.items() if count > LONGEST]
    assert not long, f"over {LONGEST} lines; split them by job:\n" + "\n".join(long)


def test_modules_of_tests_have_names_of_their_own(python_files: tuple[Path, ...], root: Path) -> None:
    """pytest imports them by name alone: of two with one name, it reads the first and fails for the second."""
    names = [path.name for path in python_files if path.is_relative_to(root / "tests") and path.name != "conftest.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_nothing_is_unfinished(code_files: list[Path], root: Path) -> None:
    found = lines_matching([path for path in code_files if path != Path(__file__)], UNFINISHED, root)
    assert not found, "\n".join(found)


def test_no_path_of_a_home_or_build_machine(files: tuple[Path, ...], root: Path) -> None:
    texts = [
        path for path in files if path.suffix in TEXT and path.stat().st_size < 2_000_000 and path != Path(__file__)
    ]
    found = lines_matching(texts, MACHINE, root)
    here = re.compile(re.escape(str(root)) + r"(?![\w-])")
    home = re.compile(re.escape(str(Path.home())) + "/") if Path.home() != Path("/") else here
    if len(root.parts) > 2:
        found += lines_matching(texts, here, root)
    found += lines_matching(texts, home, root)
    assert not found, "\n".join(found)


def test_the_pattern_for_machines_knows_one() -> None:
    for path in ("/home/ada/x", "see /Users/ada/y", '"/root/.cache"', "/tmp/x/z"):
        assert MACHINE.search(path), path
    for path in ("/var/lib/psyche/wallet.json", "/etc/psyche.toml", "/ip4/127.0.0.1/tcp/1", "docs/home/x", "~/runs"):
        assert not MACHINE.search(path), path


def test_nothing_is_silenced_wholesale(python_files: tuple[Path, ...], root: Path) -> None:
    found = lines_matching([path for path in python_files if path != Path(__file__)], BLANKET, root)
    assert not found, "name the rule:\n" + "\n".join(found)


def test_every_skip_has_a_reason(python_files: tuple[Path, ...], root: Path) -> None:
    wrong = [
        f"{path.relative_to(root)}:{line}"
        for path in python_files
        if path.is_relative_to(root / "tests")
        for line in skips_without_reason(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "a skipped or expected failure says why, and names its issue:\n" + "\n".join(wrong)


def skips_without_reason(source: str) -> list[int]:
    """Lines of skip, skipif and xfail (marks and calls) without a reason of at least a few words."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    lines = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail", "importorskip")):
            continue
        if not ast.unparse(node).startswith("pytest."):
            continue
        call = called.get(id(node))
        reasons = [] if call is None else [word.value for word in call.keywords if word.arg in ("reason", "msg")]
        if call is not None and not ast.unparse(node).startswith("pytest.mark") and node.attr in ("skip", "xfail"):
            reasons += call.args[:1]
        if not any(len(ast.unparse(reason)) >= 12 for reason in reasons):
            lines.append(node.lineno)
    return sorted(lines)


def test_the_reader_of_skips_sees_every_form() -> None:
    source = (
        "import pytest\n"
        "@pytest.mark.skip\n"
        "def a(): ...\n"
        "@pytest.mark.skipif(True, reason='')\n"
        "def b(): pytest.skip()\n"
        "@pytest.mark.xfail(reason='needs a second GPU')\n"
        "def c(): pytest.skip('no CUDA device here')\n"
    )
    assert skips_without_reason(source) == [2, 4, 5]


def test_scripts_are_executable_in_git(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR, f"chmod +x {script.relative_to(root)}"
    listed = subprocess.run(["git", "ls-files", "--stage", ".ci/run"], cwd=root, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        assert listed.stdout.startswith("100755"), "git update-index --chmod=+x .ci/run"


def test_no_secret_is_tracked(files: tuple[Path, ...], root: Path) -> None:
    """A Solana keypair file is a JSON array of 64 numbers; a node key is 32 bytes; neither belongs here."""
    keypair = re.compile(r"^\s*\[\s*(?:\d{1,3}\s*,\s*){63}\d{1,3}\s*\]\s*$")
    small = [path for path in files if path.suffix == ".json" and path.stat().st_size < 2_000]
    found = [path for path in small if keypair.match(path.read_text(encoding="utf-8"))]
    found += [path for path in files if path.suffix in (".key", ".pem")]
    assert not found, [str(path.relative_to(root)) for path in found]
