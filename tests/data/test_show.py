"""`psyche-node data show`: what it prints is what is in the folder."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from psyche_node.cli import app
from psyche_node.commands.preview import print_preview
from psyche_node.data import ChatTemplate, PackedDataset, prepare
from psyche_node.data.preview import preview_sequence
from psyche_node.data.rendering import SHIPPED
from psyche_node.exits import Exit

ANSWER = {"role": "assistant", "content": "alpha, beta \x1b[31m", "spans": [{"start": 5, "end": 11, "train": False}]}
RECORDS = [
    {"messages": [{"role": "user", "content": "Say <|eot_id|> [b]x[/b]"}, ANSWER]},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\nalpha beta gamma"}]},
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture(scope="module")
def prepared(file: Path, seed_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(file, seed_tokenizer, out, 128, heldout=0, template="hermes-llama3")
    return out


def show(*words: object, code: Exit = Exit.OK) -> str:
    done = CliRunner().invoke(app, ["data", "show", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.output


def test_a_sample_with_marks(file: Path, seed_tokenizer: Path) -> None:
    output = show(file, "--tokenizer", seed_tokenizer, "--template", "hermes-llama3")
    assert f"{file}:1" in output.replace("\n", "")
    assert "Say <|eot_id|> [b]x[/b]<|eot_id|>" in output
    assert "\n⟦alpha⟧, beta⟦ ␛[31m<|eot_id|>⟧\n" in output, "and the terminal is not steered"
    assert "\x1b" not in output


def test_length_control_is_shown(file: Path, seed_tokenizer: Path) -> None:
    words = [file, 1, "--tokenizer", seed_tokenizer, "--template", "chatml", "--length-control", 2]
    output = show(*words)
    assert "gamma" not in output
    assert "\n⟦</think>⟧\n" in output


def test_json_is_the_sequence(prepared: Path, seed_tokenizer: Path) -> None:
    values: dict[str, Any] = json.loads(show(prepared, 0, "--tokenizer", seed_tokenizer, "--json"))
    batch = PackedDataset(prepared).sequence(0)
    runs = [run for document in values["documents"] for run in document["runs"]]
    ids = [token for run in runs for token in run["ids"]]
    assert ids == batch.tokens[0][: len(ids)].tolist()
    assert [run["trained"] for run in runs for _ in run["ids"]] == batch.trained[0][: len(ids)].tolist()
    assert values["tokens"] == len(ids) == sum(document["tokens"] for document in values["documents"])
    assert values["tokens"] + values["padding"] == 128
    assert values["trained"] == batch.trained_tokens
    assert len(values["documents"]) == int((batch.places[0] == 0).sum()) - 1, "the padding is a document of its own"
    controls = {run["text"] for run in runs if run["control"]}
    assert {"<|eot_id|>", "<think>"} <= controls | {run["text"].rstrip("\n") for run in runs}
    text = "".join(run["text"] for run in runs)
    assert "Say <|eot_id|> [b]x[/b]<|eot_id|>" in text
    assert "<|eot_id|> [b]" not in controls


def test_colours_on_a_terminal(prepared: Path, seed_tokenizer: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200, highlight=False)
    print_preview(preview_sequence(prepared, 0, seed_tokenizer), console)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;32malpha\x1b[0m\x1b[90m, beta\x1b[0m" in written
    assert "\x1b[1;4;32m<|eot_id|>\x1b[0m" in written
    assert "⟦" not in written


def test_numbers_without_a_tokenizer(prepared: Path, seed_tokenizer: Path) -> None:
    eot = ChatTemplate(seed_tokenizer, "chatml").token_id("eos_token")
    assert f" {eot} ⟧" in show(prepared)


def test_what_is_not_there_is_named(prepared: Path, file: Path, seed_tokenizer: Path, tokenizer: Path) -> None:
    assert "no sequence 99" in show(prepared, 99, code=Exit.DATA)
    assert "no held-out sequence 0" in show(prepared, "--heldout", code=Exit.DATA)
    assert "was prepared with" in show(prepared, "--tokenizer", tokenizer, code=Exit.DATA)
    assert "name a `--tokenizer`" in show(file, code=Exit.DATA)
    assert "has no sample 2" in show(file, 2, "--tokenizer", tokenizer, code=Exit.DATA)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_becomes_the_folders_own(name: str, seed_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(seed_tokenizer, tmp_path, dirs_exist_ok=True)
    printed = CliRunner().invoke(app, ["data", "template", name])
    (tmp_path / "chat_template.jinja").write_text(printed.output)
    assert ChatTemplate(tmp_path).source == ChatTemplate(seed_tokenizer, name).source


def test_only_the_wanted_record_need_be_a_sample(seed_tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": "A number."}) for n in range(4)]
    lines[1] = "{broken"
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    words = ["--tokenizer", seed_tokenizer, "--template", "chatml"]
    assert "What is 2?" in show(path, 2, *words)
    assert f"{path}:2" in show(path, 1, *words, code=Exit.DATA).replace("\n", "")
    assert "has no sample 4" in show(path, 4, *words, code=Exit.DATA).replace("\n", " ")


@pytest.mark.parametrize("source", ["hf://datasets/owner/set", "https://example.invalid/a.jsonl"])
def test_what_is_elsewhere_is_not_shown(source: str) -> None:
    output = show(source, code=Exit.DATA)
    assert f"{source}: only what is on this host is shown" in " ".join(output.split())
