"""What cannot be served, asked or measured is refused at once: torch is not loaded for it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_node.exits import Exit

# The command's words, and its status; then whether torch was loaded on the way.
SCRIPT = """
import sys
from psyche_node.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


def refused(*arguments: str) -> tuple[int, str, bool]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip(), done.stdout.strip() == "True"


@pytest.mark.parametrize("command", [("serve",), ("chat", "hello", "--json"), ("eval", "--data", "prepared")])
def test_a_folder_that_is_none(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *more = command
    missing = tmp_path / "nowhere"
    assert refused(name, str(missing), *more) == (
        Exit.MODEL,
        f"there is no folder {missing}. Name a model folder, such as the checkpoint of a finished run",
        False,
    )


@pytest.mark.parametrize("inside", ["model", "checkpoint"])
def test_the_folder_around_a_model(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir()
    (tmp_path / inside / "config.json").write_text("{}")
    said = f"{tmp_path} has no config.json. Did you mean {tmp_path / inside}?"
    assert refused("serve", str(tmp_path)) == (Exit.MODEL, said, False)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, said, loaded = refused("serve", str(tmp_path), "--port", str(port))
    assert (code, loaded) == (Exit.SERVE, False)
    assert said.startswith(f"cannot listen on 127.0.0.1 port {port}: ")


def test_a_half_written_config_is_not_blamed_on_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type"')
    code, said, loaded = refused("chat", str(tmp_path), "hello")
    assert (code, loaded) == (Exit.MODEL, False)
    assert said.startswith(f"{tmp_path / 'config.json'} is not JSON (")


def test_a_model_of_the_hub_is_to_be_fetched_first(tmp_path: Path) -> None:
    code, said, _ = refused("chat", "owner/some-model.2", "hello")
    assert (code, said.endswith("hf download owner/some-model.2 --local-dir FOLDER")) == (Exit.MODEL, True)
    assert "hf download" not in refused("chat", str(tmp_path / "nowhere"), "hello")[1]


def test_data_that_is_not_prepared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, said, loaded = refused("eval", str(tmp_path), "--data", str(tmp_path))
    assert (code, loaded) == (Exit.DATA, False)
    assert said.startswith(f"{tmp_path} is a model's folder: there is no manifest.json")
