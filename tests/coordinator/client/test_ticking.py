"""The queue of those who tick."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.ticking import SLOTS_PER_PLACE, tick_delay

MEMBERS = st.integers(1, 256)


@settings(deadline=None)
@given(MEMBERS, st.integers(0, 2**31))
def test_one_is_first_one_second_and_the_wait_is_short_at_any_size(members: int, round: int) -> None:
    queue = Counter(tick_delay(member, round, members) // SLOTS_PER_PLACE for member in range(members))
    assert queue[0] == 1
    assert queue[1] == min(1, members - 1)
    assert all(queue[place] <= 2 ** (place - 1) for place in queue if place)
    assert max(queue) <= 8
    assert tick_delay(None, round, members) > max(queue) * SLOTS_PER_PLACE


@settings(max_examples=20, deadline=None)
@given(MEMBERS, st.integers(0, 2**31))
def test_everybody_is_first_once_in_as_many_rounds_as_there_are_members(members: int, round: int) -> None:
    first = [
        member
        for number in range(round, round + members)
        for member in range(members)
        if not tick_delay(member, number, members)
    ]
    assert sorted(first) == list(range(members))


def test_an_empty_run_has_a_queue() -> None:
    assert tick_delay(None, 0, 0) > 0
