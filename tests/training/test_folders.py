"""The terms that follow from a model and a data folder: what `psyche-node terms` prints, and `run create` fills in."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny import terms
from typer.testing import CliRunner

from coordinator.admin import app as admin
from coordinator.admin.folders import TERMS_OF_FOLDERS, Folders
from coordinator.admin.runs import folder_lines
from coordinator.run_config import RECIPE, ConfigError, SettingsTable
from coordinator.wallet import create_keypair
from psyche_node import folders
from psyche_node.cli import app
from psyche_node.data import PackedDataset, agreement
from psyche_node.data.textcoding import TextCoder
from psyche_node.exits import Exit
from psyche_node.training import Session


def printed(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["terms", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_are_what_a_node_compares(model_dir: Path, packed: Path, precision: str) -> None:
    found = json.loads(
        printed("--model", model_dir, "--data", packed, "--topk", "64", "--precision", precision, "--json")
    )
    data = PackedDataset(packed)
    digest = bytes.fromhex(found["layout_digest"])
    session = Session(model_dir, data, terms(topk=64), "cpu", 1, 1, layout_digest=digest)
    assert session.precision == precision, "the digest alone tells nodes the precision"
    assert found["model_root"] == session.model_root().hex()
    assert found["layout_digest"] == session.optimizer.layout.digest.hex()
    assert found["update_bytes"] == session.optimizer.layout.update_bytes
    assert (found["data_manifest"], found["samples"]) == (data.digest.hex(), len(data))
    assert found["sequence_length"] == 64


def test_the_text_is_a_section_of_a_runs_file(model_dir: Path, packed: Path) -> None:
    text = printed("--model", model_dir, "--data", packed, "--topk", "8")
    assert tomllib.loads(text)["terms"]["topk"] == 8


def test_what_cannot_be_used_ends_with_its_own_code(model_dir: Path, packed: Path, tmp_path: Path) -> None:
    def code(*words: str | Path) -> int:
        return CliRunner().invoke(app, ["terms", *map(str, words)]).exit_code

    assert code("--model", tmp_path) == Exit.MODEL
    assert code("--data", tmp_path) == Exit.DATA
    assert code() == Exit.USAGE
    (shard, *_) = packed.glob("*.bin")
    bent = tmp_path / "bent"
    bent.mkdir()
    for file in packed.iterdir():
        (bent / file.name).write_bytes(file.read_bytes())
    (bent / shard.name).write_bytes(bytes(shard.stat().st_size))
    assert code("--data", bent) == Exit.DATA_MISMATCH


def table(terms: dict[str, Any], source: str = "run.toml") -> SettingsTable:
    return SettingsTable({"terms": terms}, ((source, {"terms": terms}),))


def test_run_create_fills_them_in_and_refuses_contradictions(model_dir: Path, packed: Path) -> None:
    root = json.loads(printed("--model", model_dir, "--json"))["model_root"]
    same = {"model_root": root.upper(), "sequence_length": 64}
    found = Folders(model_dir, packed, "fp32").terms(table(same), 64)
    assert found["model_root"] == root
    assert set(found) == set(TERMS_OF_FOLDERS)
    with pytest.raises(ConfigError) as raised:
        Folders(None, packed, "fp32").terms(table({"samples": 7, "sequence_length": 4096}), 64)
    said = str(raised.value)
    assert f"terms.samples is 7 (run.toml), but --data {packed} has {found['samples']}" in said
    assert f"terms.sequence_length is 4096 (run.toml), but --data {packed} has 64" in said
    assert "leave these keys out of the file and of --set" in said


def test_the_folder_goes_over_a_recipe(packed: Path) -> None:
    recipe = table({"sequence_length": 16384}, RECIPE)
    found = Folders(None, packed, "fp32").terms(recipe, 64)
    assert found["sequence_length"] == 64
    assert "terms.sequence_length = 64 (the recipe has 16384)" in "\n".join(folder_lines(recipe, found))
    same = table({"sequence_length": 64}, RECIPE)
    assert "the recipe has" not in "\n".join(folder_lines(same, found))


def test_contradictions_are_told_before_anything_is_read(model_dir: Path, packed: Path, tmp_path: Path) -> None:
    """Neither the weights nor the sequences are there, which would be told by whoever reads them."""
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (tmp_path / "manifest.json").write_bytes((packed / "manifest.json").read_bytes())
    found = json.loads(printed("--model", tmp_path, "--data", tmp_path, "--topk", "64", "--quick", "--json"))
    whole = json.loads(printed("--model", model_dir, "--data", packed, "--topk", "64", "--json"))
    assert found.items() <= whole.items()
    assert "model_root" not in found
    with pytest.raises(ConfigError, match=r"update_bytes is 9 .*, but --model"):
        Folders(tmp_path, tmp_path, "fp32").terms(table({"update_bytes": 9}), 64)


def test_an_owner_hears_of_another_template(model_dir: Path, packed: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    heard: list[str] = []
    found = Folders(model, packed, "fp32").terms(table({}), 64, heard.append)
    assert set(found) == set(TERMS_OF_FOLDERS)
    (said,) = heard
    assert f"{packed} was rendered with the chat template" in said
    assert f"and {model} has another one" in said


def test_data_of_another_tokenizer_is_refused_unless_it_is_wanted(
    model_dir: Path, packed: Path, tmp_path: Path
) -> None:
    model, heard = tmp_path / "model", list[str]()
    shutil.copytree(model_dir, model)
    file = model / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match=r"prepared with another tokenizer than that of .* --other-tokenizer$"):
        Folders(model, packed, "fp32").terms(table({}), 64)
    found = Folders(model, packed, "fp32", other_tokenizer=True).terms(table({}), 64, heard.append)
    assert set(found) == set(TERMS_OF_FOLDERS)
    assert len(heard) == 1


def test_nothing_is_worked_out_twice(
    model_dir: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    done: list[str] = []

    def counted(where: Any, name: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **named: (done.append(name), real(*args, **named))[1])

    counted(subprocess, "Popen")
    Folders(model, packed, "fp32").terms(table({"sequence_length": 64}), 64)
    counted(folders, "build_model")
    counted(TextCoder, "read")
    counted(agreement, "rendering_of")
    words = ["--model", model, "--data", packed, "--topk", "64", "--json"]
    early, whole = map(json.loads, printed(*words, "--early").splitlines())
    quick = json.loads(printed(*words, "--quick"))
    assert early == quick | {"warning": whole["warning"]}
    assert early.items() < whole.items()
    assert sorted(done) == ["Popen", "build_model", "build_model", "rendering_of"]


def test_a_vocabulary_that_is_too_small_is_found_before_the_run_is_made(
    model_dir: Path, packed: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((model_dir / "config.json").read_text())
    tensors = load_file(model_dir / "model.safetensors")
    table = "model.embed_tokens.weight"
    save_file({**tensors, table: tensors[table][:100].contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    done = CliRunner().invoke(app, ["terms", "--model", str(tmp_path), "--data", str(packed)])
    assert done.exit_code == Exit.MODEL
    assert "has 100 token embeddings; the data was prepared with" in done.output


def test_positions_that_end_too_early_are_found_before_the_run_is_made(packed: Path, tmp_path: Path) -> None:
    short = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 60}
    (tmp_path / "config.json").write_text(json.dumps(short))
    done = CliRunner().invoke(app, ["terms", "--model", str(tmp_path), "--data", str(packed), "--quick"])
    assert done.exit_code == Exit.MODEL
    assert "has learned positions for 60 tokens" in done.output


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("[terms]\ntopk = 0", "terms.topk: it is 0 ({file}); it must be at least 1"),
        ("[terms]\ntopk = 'all'", "terms.topk: it is 'all' ({file}); it must be a whole number"),
        ("[limits]\nbatsch = 3", "limits.batsch: there is no such key ({file}); did you mean batch?"),
        ("terms = 3", "terms: it is 3 ({file}); it must be an object with keys of its own"),
    ],
    ids=["too small", "no number", "no setting", "no section"],
)
def test_settings_and_what_is_no_folder_are_told_together_and_first(tmp_path: Path, lines: str, why: str) -> None:
    wallet, file = tmp_path / "owner.json", tmp_path / "run.toml"
    create_keypair(wallet)
    file.write_text(lines)
    words = ["run", "create", "x", "--config", str(file), "--model", str(tmp_path / "nowhere")]
    words += ["--rpc", "http://127.0.0.1:9"]  # where nobody is
    done = CliRunner().invoke(admin, [*words, "--program", "1" * 32, "--payer", str(wallet)])
    assert done.exit_code == Exit.CONFIG, done.output
    assert why.format(file=file) in done.output
    assert f"--model {tmp_path / 'nowhere'}: there is no such folder" in done.output


def test_all_that_the_node_says_is_passed_on_without_a_box(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        Folders(tmp_path, None, "fp64").terms(table({}), 64)
    said = str(raised.value)
    assert "Usage: " in said
    assert "Invalid value for '--precision': " in said
    assert said.isascii()
