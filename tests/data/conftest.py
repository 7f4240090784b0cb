"""A small chat and its tokenizer, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psyche_node.data import train_tokenizer

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
]


def sentence(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words)) + "."


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    lines = []
    for number in range(200):
        messages = [
            {"role": "user", "content": f"Say {number}: {sentence(number, 3)}"},
            {"role": "assistant", "content": sentence(number, 2 + number % 17)},
        ]
        if number % 5 == 0:
            messages.insert(0, {"role": "system", "content": "Be brief — or not."})
            messages += [
                {"role": "user", "content": "More?"},
                {"role": "assistant", "content": sentence(number + 1, 5)},
            ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(chat, 400, folder)
    return folder
