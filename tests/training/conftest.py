"""A tiny model, its tokenizer and its data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY, VOCABULARY, RandomData

from psyche_node.training import make_demo_model


@pytest.fixture(scope="session")
def data() -> RandomData:
    return RandomData()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template, made here with the library that made the model's."""
    from psyche_node.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    chat = folder / "chat.jsonl"
    chat.write_text('{"prompt": "hello there", "completion": "general greetings to all of you"}\n' * 4)
    train_tokenizer(chat, VOCABULARY, folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_demo_model({**TINY, "vocab_size": VOCABULARY}, tokenizer, folder, seed=1)
    return folder
