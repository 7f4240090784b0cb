"""The robust option: hostile voters are left out on every replica alike, honest ones never; few votes prove nothing."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import DisTrO, Layout, Update, agreement, decode, encode
from optimizer.agreement import agreeing
from optimizer.codec import open_body

LAYOUT = Layout.build([("w", (64 * 24, 64 * 10))], 64)
CPU = torch.device("cpu")
RUN = bytes(32)
Votes = tuple[np.ndarray, np.ndarray]


@cache
def honest(seed: int, layout: Layout = LAYOUT, noise: float = 1.5) -> Votes:
    """The largest coefficients of one common signal, each member with noise of its own, 1.5 times as strong."""
    signal = np.random.default_rng(0).normal(size=(layout.blocks, 4096))
    seen = signal + noise * np.random.default_rng([1, seed]).normal(size=signal.shape)
    indices = np.sort(np.argpartition(-np.abs(seen), layout.topk, axis=1)[:, : layout.topk], axis=1).astype(np.uint16)
    return indices, np.take_along_axis(seen, indices.astype(np.int64), axis=1) < 0


def flipped(seed: int) -> Votes:
    indices, signs = honest(seed)
    return indices, ~signs


def random(seed: int) -> Votes:
    indices, _ = honest(seed)
    return indices, np.random.default_rng([2, seed]).random(indices.shape) < 0.5


def colluding(_: int) -> Votes:
    """All of them the same votes for the same coefficients, which have nothing to do with the signal."""
    indices = np.tile(np.arange(64, dtype=np.uint16) * 64, (LAYOUT.blocks, 1))
    return indices, np.zeros(indices.shape, np.bool_)


@cache
def lonely(seed: int) -> Votes:
    """Coefficients that no honest member chooses."""
    taken = np.zeros((LAYOUT.blocks, 4096), bool)
    for member in range(8):
        np.put_along_axis(taken, honest(member)[0].astype(np.int64), True, axis=1)
    order = np.argsort(taken + np.random.default_rng(seed).random(taken.shape), axis=1)
    indices = np.sort(order[:, :64], axis=1).astype(np.uint16)
    return indices, np.zeros(indices.shape, np.bool_)


def copied(_: int) -> Votes:
    """An honest member's votes, turned round."""
    indices, signs = honest(7)
    return indices, ~signs


def blobs(votes: list[Votes], layout: Layout = LAYOUT) -> list[bytes]:
    return [encode(Update(RUN, 0, member, *pair), layout) for member, pair in enumerate(votes)]


def counted(made: list[bytes], layout: Layout = LAYOUT) -> list[int]:
    return agreeing([open_body(blob, layout)[1] for blob in made], layout.code, CPU)


@pytest.mark.parametrize("attack", [flipped, random, colluding, lonely, copied])
@pytest.mark.parametrize("members", [4, 8])
def test_a_quarter_of_hostile_members_is_left_out(attack: Callable[[int], Votes], members: int) -> None:
    hostile = members // 4
    votes = [attack(seed) for seed in range(hostile)] + [honest(seed) for seed in range(hostile, members)]
    assert counted(blobs(votes)) == list(range(hostile, members))


@pytest.mark.parametrize("members", [1, 2, 3, 4, 8, 16])
def test_honest_members_are_never_left_out(members: int) -> None:
    assert counted(blobs([honest(seed) for seed in range(members)])) == list(range(members))


def test_nobody_knows_in_which_blocks_to_be_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile member that is honest in every fourth block of a fixed choice is noticed by a drawn one."""
    monkeypatch.setattr(agreement, "SAMPLE", 60)
    good, bad = honest(0), flipped(0)
    fixed = np.linspace(0, LAYOUT.blocks - 1, 60).astype(int)
    signs = bad[1].copy()
    signs[fixed] = good[1][fixed]
    made = blobs([(good[0], signs), *(honest(seed) for seed in range(1, 8))])
    assert counted(made) == list(range(1, 8))
    bodies = [open_body(blob, LAYOUT)[1] for blob in made]
    drawn = agreement.sampled(bodies)
    assert len(drawn) == 60
    assert np.array_equal(drawn, np.unique(drawn))
    assert np.array_equal(drawn, agreement.sampled(bodies[::-1]))
    assert not np.array_equal(drawn, agreement.sampled(bodies[1:]))


def test_where_few_votes_meet_nobody_is_left_out() -> None:
    layout = Layout.build([("w", (64, 128))], 2)
    votes = [honest(seed, layout) for seed in range(7)]
    indices, signs = honest(7, layout)
    assert counted(blobs([*votes, (indices, ~signs)], layout), layout) == list(range(8))


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(8)))
def test_the_order_of_updates_does_not_matter(order: list[int]) -> None:
    made = blobs([flipped(0), random(1), *(honest(seed) for seed in range(2, 8))])
    left = {order[number] for number in range(8)} - {order[number] for number in counted([made[i] for i in order])}
    assert left == {0, 1}


def test_a_step_leaves_hostile_votes_out_and_says_so() -> None:
    """Robust with the hostile update equals plain without it; the hostile member gets its own back."""
    made = blobs([flipped(0), *(honest(seed) for seed in range(1, 8))])
    results = []
    for robust, given_blobs in ((True, made), (True, made[::-1]), (False, made[1:])):
        weight = torch.nn.Parameter(torch.zeros(64 * 24, 64 * 10))
        optimizer = DisTrO([("w", weight)], lr=0.01, topk=64, robust=robust)
        assert optimizer.apply(given_blobs) == ((0,) if robust else ())
        results.append(weight.detach().numpy().tobytes())
    assert results[0] == results[1] == results[2]


def test_an_own_update_that_is_left_out_returns_to_the_momentum() -> None:
    weight = torch.nn.Parameter(torch.zeros(64 * 24, 64 * 10))
    optimizer = DisTrO([("w", weight)], lr=0.01, topk=64, robust=True)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    own = optimizer.encode(member=0)
    without = optimizer.state_dict()["momentum"].norm()
    rest = [encode(Update(RUN, 0, member, *honest(member)), LAYOUT) for member in range(1, 8)]
    assert decode(own, LAYOUT).member == 0
    assert optimizer.apply([own, *rest]) == (0,), "votes on noise meet others' and agree half of the time"
    assert optimizer.state_dict()["momentum"].norm() > without
    assert optimizer.travelling == {}
