"""Training groups of 2 and 4 ranks over gloo: FSDP2, tensor parallelism and both are one replica with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import TINY, VOCABULARY

from psyche_node.training import make_demo_model
from tests.gloo_world import World

Run = Callable[[int, str], None]
# Nothing here is divided evenly by 4 but the heads of llama.
MODELS = {
    "seed_oss": {**TINY, "vocab_size": VOCABULARY + 1, "intermediate_size": 67},
    "llama": {
        **TINY,
        "model_type": "llama",
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY + 3,
        "mlp_bias": True,
    },
    "qwen3": {**TINY, "model_type": "qwen3", "tie_word_embeddings": False, "vocab_size": VOCABULARY, "hidden_size": 30},
}


@pytest.fixture(scope="module")
def ranks(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    models = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        make_demo_model(config, tokenizer, models / name, seed=1)
    worlds: dict[int, World] = {}

    def run(size: int, case: str) -> None:
        if size not in worlds:
            worlds[size] = World(
                size, tmp_path_factory.mktemp(f"world{size}"), "rank_cases", {"MODEL": str(models), "LOCAL_RANK": "0"}
            )
        worlds[size].run(case)

    yield run
    for world in worlds.values():
        world.stop()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["gradients_are_those_of_one_process"])
def test_ranks(ranks: Run, size: int, case: str) -> None:
    ranks(size, case)
