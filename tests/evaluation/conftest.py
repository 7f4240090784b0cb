"""A tiny model with a tokenizer and a chat template that has a switch for reasoning, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_node.data import train_tokenizer
from psyche_node.evaluation import Subject
from psyche_node.training import make_demo_model

torch.set_num_threads(1)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("subject")
    text = base / "text.jsonl"
    lines = [
        {"prompt": f"what is {a} plus {b}", "completion": f"the sum is {a + b}"} for a in range(9) for b in range(9)
    ]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer(text, 320, base / "tokenizer")
    (base / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    make_demo_model(CONFIG, base / "tokenizer", base / "model", seed=1)
    return base / "model"


@pytest.fixture(scope="session")
def subject(folder: Path) -> Subject:
    return Subject.load(folder, "cpu", "float32", 64)


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Write a task file of these rows and settings; returns its path."""

    def write(rows: list[dict[str, Any]], **settings: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / f"{settings.get('name', 'task')}.json"
        path.write_text(json.dumps({"data": "rows.jsonl", **settings}))
        return path

    return write
