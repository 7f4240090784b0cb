"""A tiny model with the demo's tokenizer, made once; untrained, so what it says is noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from taught import teach

from psyche_node.data import train_tokenizer
from psyche_node.generation import Engine
from psyche_node.training import make_demo_model

torch.set_num_threads(1)

VOCABULARY = 300
TINY = {
    "model_type": "seed_oss",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    line = {"prompt": "hello there", "completion": "general greetings to all of you"}
    (folder / "chat.jsonl").write_text((json.dumps(line) + "\n") * 4)
    train_tokenizer(folder / "chat.jsonl", VOCABULARY, folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_demo_model(TINY, tokenizer_folder, folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def taught_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in size, with a long context window, and what ``taught`` taught it."""
    folder = tmp_path_factory.mktemp("taught")
    long = {**TINY, "max_position_embeddings": 32_768, "initializer_range": 0.06}
    make_demo_model(long, tokenizer_folder, folder, seed=1)
    teach(folder)
    return folder


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> Engine:
    return Engine.load(model_folder, device="cpu")
