"""The terms that follow from a model and a data folder: what `psyche-node terms` prints, and `run create` fills in."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny import terms
from typer.testing import CliRunner

from coordinator.admin import app as admin
from coordinator.admin.folders import TERMS_OF_FOLDERS, terms_of_folders
from coordinator.run_config import ConfigError
from coordinator.wallet import create_keypair
from psyche_node.cli import app
from psyche_node.data import PackedDataset
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


def test_run_create_fills_them_in_and_refuses_contradictions(model_dir: Path, packed: Path) -> None:
    root = json.loads(printed("--model", model_dir, "--json"))["model_root"]
    same: dict[str, Any] = {"topk": 64, "model_root": root.upper(), "sequence_length": 64}
    found = terms_of_folders({"terms": same}, model_dir, packed, "fp32")
    assert found["model_root"] == root
    assert set(found) == set(TERMS_OF_FOLDERS)
    with pytest.raises(ConfigError) as raised:
        terms_of_folders({"terms": {**same, "samples": 7, "sequence_length": 4096}}, None, packed, "fp32")
    said = str(raised.value)
    assert f"terms.samples is 7, but --data {packed} has {found['samples']}" in said
    assert f"terms.sequence_length is 4096, but --data {packed} has 64" in said


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


def test_the_command_names_the_folder_that_is_wrong(tmp_path: Path) -> None:
    wallet = tmp_path / "owner.json"
    create_keypair(wallet)
    words = ["run", "create", "x", "--recipe", "demo", "--model", str(tmp_path / "nowhere")]
    done = CliRunner().invoke(admin, [*words, "--program", "1" * 32, "--payer", str(wallet)])
    assert done.exit_code == Exit.CONFIG
    assert "nowhere has no config.json" in done.output


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("[terms]\ntopk = 0", "terms.topk: it is 0 ({file}); it must be at least 1"),
        ("[terms]\ntopk = 'all'", "terms.topk: it is 'all' ({file}); it must be a whole number"),
        ("terms = 3", "terms: it is 3 ({file}); it must be an object with keys of its own"),
    ],
    ids=["too small", "no number", "no section"],
)
def test_settings_that_the_folders_need_are_looked_at_first(tmp_path: Path, lines: str, why: str) -> None:
    wallet, file = tmp_path / "owner.json", tmp_path / "run.toml"
    create_keypair(wallet)
    file.write_text(lines)
    words = ["run", "create", "x", "--config", str(file), "--model", str(tmp_path / "nowhere")]
    done = CliRunner().invoke(admin, [*words, "--program", "1" * 32, "--payer", str(wallet)])
    assert done.exit_code == Exit.CONFIG, done.output
    assert why.format(file=file) in done.output
    assert "nowhere" not in done.output


def test_all_that_the_node_says_is_passed_on_without_a_box(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        terms_of_folders({}, tmp_path, None, "fp64")
    said = str(raised.value)
    assert "Usage: " in said
    assert "Invalid value for '--precision': " in said
    assert said.isascii()
