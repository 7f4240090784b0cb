"""A checkpoint loads in another process, with nothing but transformers, and answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, VOCABULARY, RandomData, terms

from psyche_node.generation import Engine
from psyche_node.training import Session, make_demo_model
from psyche_node.training import checkpoint as checkpoint_module

LOAD = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
state = hashlib.sha256()
for _, p in sorted(model.named_parameters()):
    state.update(p.detach().numpy().tobytes())
chat = [{"role": "user", "content": "hello"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
out = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4)
same_end = model.generation_config.eos_token_id == tokenizer.eos_token_id
new = out.shape[1] - ids.shape[1]
alone = "psyche_node" not in sys.modules
kind = type(model).__name__
print(json.dumps([kind, str(model.dtype), state.hexdigest(), tokenizer.eos_token, new, same_end, alone]))
"""


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path, data: RandomData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Path]:
    session = Session(model_dir, data, terms(), device="cpu")
    for number in range(2):
        result = session.train(number, [0, 1], run=bytes(32), member=0)
        session.apply(number, [result.blob], True)
    folder = tmp_path_factory.mktemp("out") / "checkpoint"
    session.save(folder, {"run": "demo | `x`", "rounds": "2"})
    return session, folder


def test_it_loads_elsewhere(checkpoint: tuple[Session, Path], tmp_path: Path) -> None:
    session, folder = checkpoint
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    sha = session.weights_sha256()
    assert found == ["SeedOssForCausalLM", "torch.float32", sha, "<|eot_id|>", 4, True, True]


def test_it_has_everything_and_says_where_it_came_from(checkpoint: tuple[Session, Path]) -> None:
    session, folder = checkpoint
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    readme = (folder / "README.md").read_text()
    assert f"| weights SHA-256 | `{session.weights_sha256()}` |" in readme
    assert f"| model root (BLAKE3) | `{session.model_root().hex()}` |" in readme
    assert "| run | `demo / 'x'` |" in readme


@pytest.mark.parametrize(
    "advice",
    [
        {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 3]},  # which transformers does not write
        {"do_sample": True, "temperature": 0.6, "own": "words"},
        None,
    ],
)
def test_what_a_folder_advises_about_generation_stays(
    model_dir: Path, data: RandomData, tmp_path: Path, advice: dict[str, Any] | None
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.unlink()
    if advice is not None:
        file.write_text(json.dumps(advice))
    Session(tmp_path / "model", data, terms(), device="cpu").save(tmp_path / "saved")
    make_demo_model(tmp_path / "model", model_dir, tmp_path / "copy", seed=0)
    for folder in (tmp_path / "saved", tmp_path / "copy"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == advice if advice is not None else "temperature" not in found
        Engine.load(folder, device="cpu")


@pytest.mark.parametrize("file_bytes", [checkpoint_module.FILE_BYTES, 20_000])
def test_experts_are_saved_apart_as_their_family_does(
    model_dir: Path, data: RandomData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    """Modules hold them in one tensor; checkpoints, and whatever else reads them, do not."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(checkpoint_module, "FILE_BYTES", file_bytes)
    config = {**TINY, "model_type": "mixtral", "vocab_size": VOCABULARY, "num_local_experts": 3}
    make_demo_model(config, model_dir, tmp_path / "model", seed=0)
    one = Session(tmp_path / "model", data, terms(), device="cpu")
    one.save(tmp_path / "saved")
    theirs, ours = (
        {name: tensor for file in (tmp_path / where).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for where in ("model", "saved")
    )
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in ours
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (file_bytes == 20_000)
    assert Session(tmp_path / "saved", data, terms(), device="cpu").model_root() == one.model_root()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert all(torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in one.model.named_parameters())


def test_saving_again_replaces_the_folder(checkpoint: tuple[Session, Path]) -> None:
    session, folder = checkpoint
    (folder / "left-over").write_text("x")
    session.save(folder)
    assert not (folder / "left-over").exists()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "no temporary folder stays"


def test_it_can_be_talked_to(checkpoint: tuple[Session, Path]) -> None:
    _, folder = checkpoint
    engine = Engine.load(folder, device="cpu")
    prompt = engine.encode([{"role": "user", "content": "hello there"}])
    first, again = (engine.generate([prompt], 12, advice=engine.advice)[0] for _ in range(2))
    assert first == again
    assert engine.advice.temperature == 0.0
    assert engine.advice.repetition_penalty == 1.1, "what a small model needs"
    assert "<|" not in first.text
