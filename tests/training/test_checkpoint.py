"""A checkpoint loads in another process, with nothing but transformers, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import RandomData, terms

from psyche_node.generation import Engine
from psyche_node.training import Session

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
    assert "<|" not in first.text


def test_advice_about_sampling_stays_in_it(checkpoint: tuple[Session, Path], tmp_path: Path) -> None:
    """What a base model's folder advises is still there after a run, and so is what a small model needs."""
    session, folder = checkpoint
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.1
    session.model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95)
    try:
        session.save(tmp_path / "advised")
    finally:
        session.model.generation_config.update(do_sample=False, temperature=None, top_p=None)
    kept = json.loads((tmp_path / "advised" / "generation_config.json").read_text())
    assert (kept["do_sample"], kept["temperature"], kept["top_p"]) == (True, 0.6, 0.95)
