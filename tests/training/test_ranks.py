"""Training groups of 2 and 4 ranks over gloo: FSDP2, tensor parallelism and both are one replica with one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[[int, str], None]
CASES = "rank_cases"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        "gradients_are_those_of_one_process",
        "ranks_go_through_as_many_chunks",
        "layouts_stay_one_model",
        "bf16_layouts_stay_one_model",
        "one_gradient_makes_one_update",
        "clipping_is_by_the_norm_of_the_whole",
        "shares_need_not_fill_the_ranks",
        "a_checkpoint_is_one_model_folder",
        "each_rank_reads_what_it_holds",
    ],
)
def test_ranks(ranks: Run, size: int, case: str) -> None:
    ranks(size, case)


def test_two_ranks_and_torch_compile(ranks: Run) -> None:
    ranks(2, "compiled_layers_are_captured_once")


def test_two_ranks_whose_weights_travel_in_bf16(ranks: Run) -> None:
    ranks(2, "weights_travel_in_bf16_as_on_gpus")


def test_two_ranks_keep_pace(ranks: Run) -> None:
    ranks(2, "ranks_keep_pace_with_what_rank_0_writes")


def test_four_ranks_and_two_heads(ranks: Run) -> None:
    ranks(4, "heads_that_cannot_be_divided_stay_whole")
