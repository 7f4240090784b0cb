"""The balanced order: one to one at any size, the same for everyone, and of equal cost wherever it is cut."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_node.data import order, permutation
from psyche_node.data.order import balanced_order
from psyche_node.data.packing import attention_costs, pack

GOLDEN = [6, 3543, 1074, 2524, 1565, 3047, 572, 4048]
HUGE = 10**10


def unpermute(values: npt.ArrayLike, size: int, key: bytes) -> npt.NDArray[np.uint64]:
    """The keyed permutation backwards: the Feistel rounds in reverse, walked until inside."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = np.array(values, dtype=np.uint64).reshape(-1)
    outside = np.arange(found.size)
    while outside.size:
        left, right = found[outside] >> half, found[outside] & mask
        for one in permutation._keys(key)[::-1]:
            left, right = right ^ (permutation._mix(left ^ one) & mask), left
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= np.uint64(size)]
    return found


def position_of(sequence: int, size: int, key: bytes) -> int:
    """The balanced order backwards, one sequence at a time, from its description."""
    cycle = next(cycle for cycle in order._CYCLES if len(cycle) <= size)
    rounds, left = divmod(size, len(cycle))
    stratum = next(s for s in range(len(cycle)) if sequence < (s + 1) * rounds + (s + 1) * left // len(cycle))
    start, end = (s * rounds + s * left // len(cycle) for s in (stratum, stratum + 1))
    visit = int(unpermute([sequence - start], end - start, key + stratum.to_bytes(2, "little"))[0])
    if visit < rounds:
        return visit * len(cycle) + cycle.index(stratum)
    return rounds * len(cycle) + position_of(stratum * left // len(cycle), left, key + b"last")


@settings(max_examples=40)
@given(st.integers(1, 300), st.binary(max_size=8))
def test_every_sequence_has_one_position(size: int, key: bytes) -> None:
    image = balanced_order(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))
    some = range(0, size, 1 + size // 20)
    assert all(position_of(int(image[at]), size, key) == at for at in some)


@given(st.integers(1, HUGE), st.data())
def test_one_to_one_at_sizes_that_no_table_holds(size: int, data: st.DataObject) -> None:
    """It has an inverse: no two positions, of however many, are the same sequence."""
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    for position, sequence in zip(positions, balanced_order(positions, size, b"k").tolist(), strict=True):
        assert 0 <= sequence < size
        assert position_of(sequence, size, b"k") == position


def test_ten_billion_positions_need_no_memory() -> None:
    balanced_order([0], HUGE, b"warm")
    tracemalloc.start()
    try:
        first = balanced_order(np.arange(HUGE - 384, HUGE), HUGE, b"seed")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(np.unique(first)) == 384
    assert peak < 1 << 20


def costs_of_a_mix(count: int) -> npt.NDArray[np.int64]:
    """Attention costs, in order, of packed sequences whose documents' lengths are log-normal."""
    rng = np.random.default_rng(7)
    lengths = np.clip(rng.lognormal(np.log(586), 0.925, count).astype(np.int64), 16, 4096)
    return np.sort(attention_costs(lengths, pack(lengths, 4096)))


COSTS = costs_of_a_mix(40_000)


WHOLE = len(COSTS) - len(COSTS) % 64  # what does not fill a last cycle is less regular


@given(st.integers(0, WHOLE - 6 * 128), st.sampled_from([16, 32, 48, 64, 96, 128]), st.binary(max_size=4))
def test_slices_of_one_size_cost_the_same_wherever_they_begin(start: int, size: int, key: bytes) -> None:
    """Whatever was queued again before, and in whatever order members come."""
    positions = np.arange(start, start + 6 * size)
    slices = COSTS[balanced_order(positions, len(COSTS), key).astype(np.int64)].reshape(6, size).mean(axis=1)
    assert abs(slices / slices.mean() - 1).max() < (0.06 if size == 16 else 0.03)


@given(st.lists(st.integers(1, 8), min_size=2, max_size=8), st.integers(0, WHOLE // 256 - 1), st.binary(max_size=4))
def test_members_with_unequal_shares_differ_by_less_than_one_sequence(
    shares: list[int], number: int, key: bytes
) -> None:
    """A slice that is no whole cycle is off by what its odd part is, less than the dearest sequence, and not more."""
    batch = 256
    cuts = [0, *(batch * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares)))]
    costs = COSTS[balanced_order(np.arange(number * batch, (number + 1) * batch), len(COSTS), key).astype(np.int64)]
    mean = costs.mean()
    for low, high in pairwise(cuts):
        assert abs(costs[low:high].sum() - (high - low) * mean) < 1.25 * COSTS[-1]


def test_each_slice_of_a_cycle_holds_every_stratum() -> None:
    for cycle in order._CYCLES:
        assert sorted(cycle) == list(range(len(cycle)))
    twice = np.array(order._CYCLES[0] * 2)
    assert all(sorted(twice[at : at + 8] // 8) == list(range(8)) for at in range(64)), "any 8 in a row"


def test_order_depends_on_the_key() -> None:
    size = 10_000
    one, other = (balanced_order(np.arange(size), size, key).astype(np.int64) for key in (b"a", b"b"))
    # In the same stratum by construction; the same sequence of its 156 by chance only.
    assert 20 < (one == other).sum() < 130
    neighbours = np.sort(one.reshape(-1, 8), axis=1)
    assert len(np.unique(neighbours, axis=0)) == size // 8


def test_golden_values() -> None:
    """The order of the data is part of the protocol: every member must draw the same sequences."""
    assert balanced_order(np.arange(8), 4083, b"psyche").tolist() == GOLDEN


def test_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="outside"):
        balanced_order([5], 5, b"")
    with pytest.raises(ValueError, match="there must be between"):
        balanced_order([], 0, b"")
