"""A tiny model, its tokenizer and its data, made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import TINY, VOCABULARY, WORDS, RandomData

from psyche_node.training import make_demo_model
from tests.gloo_world import World


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


@pytest.fixture(scope="session")
def packed(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data for processes, which read it from a folder."""
    from psyche_node.data import prepare

    out = tmp_path_factory.mktemp("packed")
    lines = [{"prompt": f"{a}?", "completion": f"{a} {b} {a}"} for a in WORDS for b in WORDS]
    (out / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(out / "chat.jsonl", tokenizer, out, 64, heldout=0.2)
    return out


RunCase = Callable[[int, str], None]
MODELS = {
    # Its padding token, which embeddings do not learn, is frequent in the data.
    "seed_oss": {**TINY, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "pad_token_id": 295},
    "llama": {**TINY, "model_type": "llama", "num_key_value_heads": 4, "mlp_bias": True, "vocab_size": VOCABULARY + 3},
    # Widths that neither 2 nor 4 divides, norms that see a part of the heads, a tied head.
    "qwen3": {
        **TINY,
        "model_type": "qwen3",
        "vocab_size": VOCABULARY + 1,
        "hidden_size": 30,
        "intermediate_size": 67,
        "num_key_value_heads": 4,
    },
}


@pytest.fixture(scope="module")
def ranks(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunCase]:
    """Runs a case of the module that the test's one names as CASES, by number of ranks and name."""
    models = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        make_demo_model(config, tokenizer, models / name, seed=1)
    worlds: dict[int, World] = {}

    def run(size: int, case: str) -> None:
        if size not in worlds:
            worlds[size] = World(
                size,
                tmp_path_factory.mktemp(f"world{size}"),
                request.module.CASES,
                {"MODEL": str(models), "LOCAL_RANK": "0"},
            )
        worlds[size].run(case)

    yield run
    for world in worlds.values():
        world.stop()
