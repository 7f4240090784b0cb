"""What goes wrong on one rank of 2 or 4, or on all, is one failure, and the group goes on where it can."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[[int, str], None]
CASES = "rank_failures"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        "a_gradient_that_is_not_finite_is_everybodys",
        "a_step_that_breaks_off_everywhere_leaves_the_round",
        "memory_that_runs_out_on_one_rank_is_everybodys",
        "what_fails_within_a_step_on_one_rank_fails_on_all",
        "motions_that_fail_before_the_step_did_leave_nothing_behind",
        "all_ranks_take_the_same_attention",
        "all_ranks_take_the_same_attention_in_compiled_layers",
        "a_rank_that_cannot_compile_is_everybodys",
        "the_rank_with_least_memory_decides",
        "a_step_that_fails_on_one_rank_fails_on_all",
        "an_update_that_cannot_be_written_is_taken_back",
        "files_reach_other_hosts",
        "what_cannot_be_divided_is_refused",
    ],
)
def test_failures(ranks: Run, size: int, case: str) -> None:
    ranks(size, case)
