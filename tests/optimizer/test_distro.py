"""The optimizer against a plain oracle in numpy: exact steps, exact lookahead."""

import copy
import itertools

import numpy as np
import pytest
import torch
from drawn import RUN, Make, bits, give_gradients, updates

from optimizer import DisTrO, MalformedUpdate, Update, decode, encode
from optimizer.errors import OptimizerError
from optimizer.rates import rate

H = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(64)] for i in range(64)], np.int64)


def tiles(values: np.ndarray, matrix: tuple[int, int]) -> list[np.ndarray]:
    """64x64 tiles of a matrix with zeros beyond its edges, by the definition."""
    height, width = matrix
    padded = np.zeros((-(-height // 64) * 64, -(-width // 64) * 64), values.dtype)
    padded[:height, :width] = values.reshape(matrix)
    return [padded[i : i + 64, j : j + 64] for i in range(0, len(padded), 64) for j in range(0, padded.shape[1], 64)]


def in_tensors(blocks: np.ndarray, optimizer: DisTrO) -> dict[str, np.ndarray]:
    """Values of blocks (N, 64, 64) where the layout puts them, by the definition."""
    found = {}
    for placement in optimizer.layout.placements:
        mine = blocks[placement.first : placement.first + placement.blocks]
        if placement.matrix is None:
            values = mine.reshape(-1)[placement.offset : placement.offset + placement.numel]
        else:
            down, across = -(-placement.matrix[0] // 64), -(-placement.matrix[1] // 64)
            whole = mine.reshape(down, across, 64, 64).swapaxes(1, 2).reshape(down * 64, across * 64)
            values = whole[: placement.matrix[0], : placement.matrix[1]]
        found[placement.name] = values.reshape(placement.shape)
    return found


def inverse_of_votes(blobs: list[bytes], optimizer: DisTrO, clip: bool) -> np.ndarray:
    votes = np.zeros((optimizer.layout.blocks, 4096), np.int64)
    for update in (decode(blob, optimizer.layout) for blob in blobs):
        for block, (indices, signs) in enumerate(zip(update.indices, update.signs, strict=True)):
            votes[block, indices] += np.where(signs, -1, 1)
    return H @ (np.clip(votes, -1, 1) if clip else votes).reshape(-1, 64, 64) @ H


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("window", [0, 3])
def test_apply_equals_an_oracle_in_integers(
    make: Make, engine: str, clip: bool, weight_decay: float, window: int
) -> None:
    """Three rounds: the trend in 64-bit integers, its leak rounded away from zero, steps in two roundings."""
    named = make()
    settings = {"weight_decay": weight_decay, "clip_votes": clip, "window": window}
    optimizer = DisTrO(named, lr=0.01, topk=32, slab_blocks=3, engine=engine, **settings)
    lr = np.float32(0.003)
    share = np.float32(1.0 - float(lr) * float(np.float32(weight_decay)))
    trend = np.zeros((optimizer.layout.blocks, 64, 64), np.int64)
    for round in range(3):
        blobs = updates(optimizer, 5, round)
        before = {name: p.detach().numpy().copy() for name, p in named}
        optimizer.apply(blobs, lr=0.003)
        leak = np.sign(trend) * -(-np.abs(trend) // 2**window)
        trend = trend - leak + 8 * inverse_of_votes(blobs, optimizer, clip)
        assert np.abs(trend).max() < 2**15
        assert np.array_equal(optimizer.state_dict()["trend"].numpy().reshape(trend.shape), trend)
        steps = in_tensors(np.sign(trend).astype(np.float32) * lr, optimizer)
        assert (trend == 0).any(), "exact ties happen, and do not move"
        for name, weights in before.items():
            want = (weights * share if weight_decay else weights) - steps[name]
            assert want.dtype == np.float32
            assert dict(named)[name].detach().numpy().tobytes() == want.tobytes(), name


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_the_trend_stops_at_the_end_of_its_range(engine: str) -> None:
    """All members vote alike, for the sum over a block: one weight's change is 4,096 per vote, and 16 bits are full."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = DisTrO([("w", weight)], lr=0.5, topk=4096, engine=engine, clip_votes=False)
    layout = optimizer.layout
    indices = np.arange(4096, dtype=np.uint16)[None]
    for sign, end in ((False, 32767), (True, -32767)):
        for round in range(2):
            signs = np.full((1, 4096), sign)
            optimizer.apply([encode(Update(RUN, round, member, indices, signs), layout) for member in range(3)])
        assert optimizer.state_dict()["trend"][0, 0] == end
    assert weight[0, 0] == 0.0, "two steps down and two up"


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_encode_equals_an_oracle(engine: str) -> None:
    """Momentum, selection and error feedback over three rounds of one ragged matrix, in float64."""
    weight = torch.nn.Parameter(torch.zeros(70, 66))
    optimizer = DisTrO([("w", weight)], lr=0.5, decay=0.9, topk=8, engine=engine)
    momentum = np.zeros((4, 4096))
    for round in range(3):
        gradient = np.random.default_rng(round).normal(size=(70, 66)).astype(np.float32)
        weight.grad = torch.from_numpy(gradient)
        update = decode(optimizer.encode(run=RUN, round=round, member=3), optimizer.layout)
        assert weight.grad is None
        coefficients = [(H @ tile @ H).ravel() / 64 for tile in tiles(gradient.astype(np.float64), (70, 66))]
        momentum = momentum * 0.9 + 0.5 * np.array(coefficients)
        for block in range(4):
            top = np.sort(np.argsort(-np.abs(momentum[block]), kind="stable")[:8])
            assert update.indices[block].tolist() == top.tolist()
            assert update.signs[block].tolist() == (momentum[block, top] < 0).tolist()
            momentum[block, top] -= np.sign(momentum[block, top]) * np.abs(momentum[block, top]).mean()
        assert (update.run, update.round, update.member) == (RUN, round, 3)
        assert np.allclose(optimizer.state_dict()["momentum"].numpy(), momentum, atol=1e-5)


def test_order_slabs_and_threads_do_not_matter(make: Make) -> None:
    blobs = updates(DisTrO(make(), lr=0.01, topk=32), 4)
    results = set()
    for order, slab, threads in zip(
        itertools.islice(itertools.permutations(blobs), 0, 24, 3),
        itertools.cycle([1, 2, 7, 256]),
        [1, 2] * 4,
        strict=False,
    ):
        torch.set_num_threads(threads)
        named = make()
        optimizer = DisTrO(named, lr=0.01, topk=32, weight_decay=0.1, slab_blocks=slab, clip_votes=False)
        optimizer.apply(list(order), lr=0.01)
        results.add((b"".join(bits(named)), optimizer.fingerprint()))
    assert len(results) == 1
    assert next(iter(results))[0] != b"".join(bits(make()))


def test_encode_does_not_depend_on_slabs(make: Make) -> None:
    blobs = []
    for slab in (1, 3, 256):
        named = make()
        optimizer = DisTrO(named, lr=0.01, topk=16, slab_blocks=slab)
        give_gradients(named, 4)
        blobs.append(optimizer.encode(run=RUN, round=0, member=0))
    assert blobs[0] == blobs[1] == blobs[2]


def test_bits_and_floats_are_the_same_rate(make: Make) -> None:
    results = []
    for lr in (0.00317, int(np.float32(0.00317).view(np.uint32))):
        named = make()
        optimizer = DisTrO(named, lr=lr, topk=8)
        assert optimizer.lr == [float(np.float32(0.00317))]
        optimizer.apply(updates(optimizer, 2), lr=lr)
        results.append(bits(named))
    assert results[0] == results[1]
    for bad in (float("nan"), float("inf"), -0.1, 1e39, 1 << 32, -1, 1, 3, 0x7F800000, 0x80000001, True):
        with pytest.raises(ValueError, match="learning rate"):
            rate(bad)


def test_void_round_changes_nothing(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=32, weight_decay=0.5)
    optimizer.apply(updates(optimizer, 3))
    weights, before = bits(named), copy.deepcopy(optimizer.state_dict())
    optimizer.apply([], lr=0.01)
    assert bits(named) == weights
    for key in ("trend", "momentum"):
        assert torch.equal(optimizer.state_dict()[key], before[key])


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_without_votes_every_weight_comes_to_rest(engine: str) -> None:
    """Votes that cancel out: the trend leaks to zero from both sides, and the last of it moves nothing for ever."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = DisTrO([("w", weight)], lr=1.0, topk=2, engine=engine)
    indices, layout = np.array([[0, 77]], np.uint16), optimizer.layout

    def update(member: int, negative: bool) -> bytes:
        return encode(Update(RUN, 0, member, indices, np.array([[negative, not negative]])), layout)

    optimizer.apply([update(0, False)])
    assert (optimizer.state_dict()["trend"] != 0).any()
    for _ in range(40):
        optimizer.apply([update(0, False), update(1, True)])
    assert not optimizer.state_dict()["trend"].any()
    rest = bits([("w", weight)])
    optimizer.apply([update(0, False), update(1, True)])
    assert bits([("w", weight)]) == rest


def test_negative_zero_and_padding(make: Make) -> None:
    """A weight that does not move keeps its bits, -0.0 too: lr 0 moves nothing."""
    weight = torch.nn.Parameter(torch.full((65, 3), -0.0))
    optimizer = DisTrO([("w", weight)], lr=0.01, topk=8)
    optimizer.apply(updates(optimizer, 2), lr=0.0)
    assert torch.signbit(weight).all()


def test_a_bad_blob_is_refused_before_anything_changes(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=32, slab_blocks=1)
    good = updates(optimizer, 3)
    spoiled = bytearray(good[2])
    spoiled[-40:] = bytes(40)
    for blobs, reason in (
        ([good[0], good[1], bytes(spoiled)], "bitmap"),
        ([good[0], good[1][:-1]], "bytes"),
        ([good[0], good[0]], "member 0 has more than one"),
        ([good[0], updates(optimizer, 2, round=1)[1]], "apply one round at a time"),
    ):
        with pytest.raises(MalformedUpdate, match=reason):
            optimizer.apply(blobs, lr=0.01)
    assert bits(named) == bits(make())


@pytest.mark.parametrize("engine", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lookahead_previews_the_step_and_restores_every_bit(make: Make, dtype: torch.dtype, engine: str) -> None:
    """What the trend becomes by own votes that travel; were there no other members, exactly the next weights."""
    named = make(dtype=dtype)
    optimizer = DisTrO(named, lr=0.01, topk=32, slab_blocks=2, engine=engine)
    optimizer.apply(updates(optimizer, 3))
    give_gradients(named, 1)
    own = optimizer.encode(run=RUN, round=1, member=0)
    before = bits(named)
    with optimizer.lookahead():
        seen = bits(named)
        sum((p.float() * 3).sum() for _, p in named).backward()
    assert bits(named) == before
    assert all(p.grad is not None and (p.grad == 3).all() for _, p in named)
    with pytest.raises(RuntimeError, match="boom"), optimizer.lookahead():
        raise RuntimeError("boom")
    assert bits(named) == before
    with optimizer.lookahead():
        for call in (
            lambda: optimizer.apply([], lr=0.1),
            optimizer.fingerprint,
            lambda: optimizer.lookahead().__enter__(),
        ):
            with pytest.raises(OptimizerError, match="inside lookahead"):
                call()
    assert bits(named) == before
    optimizer.apply([own])
    assert bits(named) == seen
    with optimizer.lookahead():
        assert bits(named) != seen, "the trend goes on without votes"


def test_lookahead_can_be_turned_off(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, lookahead=False)
    give_gradients(named, 1)
    optimizer.encode(run=RUN, round=0, member=0)
    with optimizer.lookahead():
        assert bits(named) == bits(make())
