"""Sharded models on 1, 2 and 4 processes: what each holds, what they exchange, and that all layouts are one replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.gloo_world import World

Ranks = Callable[[int, str], None]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    worlds: dict[int, World] = {}

    def run(size: int, case: str) -> None:
        if size not in worlds:
            worlds[size] = World(size, tmp_path_factory.mktemp(f"world{size}"), "sharded_cases")
        worlds[size].run(case)

    yield run
    for world in worlds.values():
        world.stop()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "case",
    [
        "parts_of_distributed_tensors",
        "parts_of_models",
        "exchange_completes_the_border",
        "assemble_makes_the_body_on_every_rank",
        "agreement_and_sums",
        "gradients_are_placed_like_their_parameters",
        "writes_reach_the_next_forward",
        "rounds_equal_those_of_one_process",
        "training_equals_that_of_one_process",
        "sites_of_every_layout_stay_one_model",
        "a_saved_state_goes_on",
        "faults_on_one_process_are_raised_on_all",
    ],
)
def test_on_any_number_of_processes(ranks: Ranks, size: int, case: str) -> None:
    ranks(size, case)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        "parts_of_fsdp_over_tensor_parallel",
        "shards_that_cannot_be_told",
        "copies_that_differ_are_told",
        "a_state_of_another_sharding_is_refused",
        "replicas_stay_equal_for_long",
    ],
)
def test_on_several_processes(ranks: Ranks, size: int, case: str) -> None:
    ranks(size, case)


def test_plain_tensors_are_one_process(ranks: Ranks) -> None:
    ranks(1, "plain_tensors_are_one_process")
