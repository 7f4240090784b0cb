"""Packing and the keyed permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.data.packing import attention_costs, pack
from psyche_node.data.permutation import permute

GOLDEN = [3140, 3518, 1275, 1157, 2406, 427, 655, 3365]
GOLDEN_LARGE = 144499448667435


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The textbook algorithm, quadratic: the number of bins it needs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 64))
def test_packing_holds_every_document_once_and_is_best_fit(lengths: list[int], capacity: int) -> None:
    sequences = pack(lengths, capacity)
    count = best_fit_decreasing(lengths, capacity)
    assert sorted(set(sequences.tolist())) == list(range(count)), "each document has one, and none is empty"
    filled = np.bincount(sequences, weights=lengths, minlength=count)
    assert (filled <= capacity).all()
    squares = [sum(n * n for n, s in zip(lengths, sequences, strict=True) if s == one) for one in range(count)]
    assert attention_costs(lengths, sequences).tolist() == squares


def test_packing_fills_sequences_of_a_real_mix() -> None:
    """Characters of Hermes 4's samples (mean 14,394, median 9,382) at four a token; `benchmarks.data` has 200,000."""
    characters = np.random.default_rng(3).lognormal(np.log(9382), np.sqrt(2 * np.log(14394 / 9382)), 30_000)
    lengths = np.ceil(characters / 4).astype(np.int64)
    lengths = lengths[lengths <= 16_384]
    sequences = pack(lengths, 16_384)
    assert lengths.sum() / ((int(sequences.max()) + 1) * 16_384) >= 0.999


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match="document 0 has 0 tokens"):
        pack([0], 8)
    assert pack([], 8).tolist() == []


@given(st.integers(1, 3000), st.binary(max_size=8))
def test_permutation_is_one_to_one(size: int, key: bytes) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


@given(st.integers(1, 1 << 62), st.integers(0, 1 << 62), st.binary(max_size=4))
def test_permutation_stays_inside_any_size_and_one_by_one_is_the_same(size: int, index: int, key: bytes) -> None:
    indices = np.array([index % size, 0, size - 1], dtype=np.uint64)
    image = permute(indices, size, key)
    assert int(image.max()) < size
    assert [int(permute(i, size, key)) for i in indices] == image.tolist()


def test_permutation_depends_on_the_key_and_spreads() -> None:
    size = 10_000
    image = permute(np.arange(size), size, b"a").astype(np.int64)
    other = permute(np.arange(size), size, b"b").astype(np.int64)
    assert (image == other).sum() < 20
    # Neighbours land a third of the range apart on average, as independent uniform values do.
    assert abs(np.abs(np.diff(image)).mean() / (size / 3) - 1) < 0.05
    quarters = np.bincount(image[: size // 4] * 4 // size, minlength=4)
    assert abs(quarters - size / 16).max() < 120


def test_permutation_golden_values() -> None:
    """The order of the data is part of the protocol: every member must draw the same sequences."""
    assert permute(np.arange(8), 4083, b"psyche").tolist() == GOLDEN
    assert permute(np.array([10**12]), 10**15, b"psyche").tolist() == [GOLDEN_LARGE]


def test_permutation_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="outside"):
        permute([5], 5, b"")
    with pytest.raises(ValueError, match="size must be between"):
        permute([], 0, b"")
