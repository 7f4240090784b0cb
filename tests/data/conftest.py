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


SEED_TOKENS = (
    *("<seed:bos>", "<seed:pad>", "<seed:eos>", "<seed:think>", "</seed:think>"),
    *("<seed:cot_budget_reflect>", "</seed:cot_budget_reflect>", "<seed:tool_call>", "</seed:tool_call>"),
)
HEADER_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def seed_tokenizer(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's byte-level BPE with Seed-OSS's control tokens, Hermes's headers and ChatML, without a template."""
    from tokenizers import AddedToken, Tokenizer

    folder = tmp_path_factory.mktemp("seed")
    seed = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    seed.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SEED_TOKENS + HEADER_TOKENS + CHATML_TOKENS]
    )
    seed.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    seed.save(str(folder / "tokenizer.json"))
    config = {
        "backend": "tokenizers",
        "bos_token": "<seed:bos>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<seed:pad>",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
