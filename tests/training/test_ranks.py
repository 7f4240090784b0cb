"""Training groups of 2 and 4 ranks over gloo: FSDP2, tensor parallelism and both are one replica with one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import TINY, VOCABULARY

from psyche_node.training import make_demo_model
from tests.gloo_world import World

Run = Callable[[int, str], None]
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
@pytest.mark.parametrize(
    "case",
    [
        "gradients_are_those_of_one_process",
        "ranks_go_through_as_many_chunks",
        "one_gradient_makes_one_update",
        "layouts_stay_one_model",
        "bf16_layouts_stay_one_model",
        "a_gradient_that_is_not_finite_is_everybodys",
        "a_step_that_breaks_off_everywhere_leaves_the_round",
        "memory_that_runs_out_on_one_rank_is_everybodys",
        "what_fails_within_a_step_on_one_rank_fails_on_all",
        "all_ranks_take_the_same_attention",
        "clipping_is_by_the_norm_of_the_whole",
        "shares_need_not_fill_the_ranks",
        "a_checkpoint_is_one_model_folder",
        "each_rank_reads_what_it_holds",
        "the_rank_with_least_memory_decides",
        "a_step_that_fails_on_one_rank_fails_on_all",
        "an_update_that_cannot_be_written_is_taken_back",
        "files_reach_other_hosts",
        "what_cannot_be_divided_is_refused",
    ],
)
def test_ranks(ranks: Run, size: int, case: str) -> None:
    ranks(size, case)


def test_four_ranks_and_two_heads(ranks: Run) -> None:
    ranks(4, "heads_that_cannot_be_divided_stay_whole")
