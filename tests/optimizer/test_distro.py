"""The optimizer against a plain oracle in numpy, and its promises: exact steps, exact lookahead, nothing lost."""

import copy
import itertools
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from optimizer import DisTrO, MalformedUpdate, Update, decode, encode
from optimizer.codec import Header
from optimizer.errors import NonFiniteGradient, OptimizerError, UnknownRound
from optimizer.rates import rate, rate_bits

Named = list[tuple[str, torch.nn.Parameter]]
Make = Callable[..., Named]
RUN = bytes(range(32))
H = np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(64)] for i in range(64)], np.int64)


def bits(tensors: Named) -> list[bytes]:
    return [
        t.detach().view(torch.int16 if t.element_size() == 2 else torch.int32).numpy().tobytes() for _, t in tensors
    ]


def give_gradients(named: Named, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p in named:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def updates(optimizer: DisTrO, members: int, round: int = 0, seed: int = 0) -> list[bytes]:
    """Random updates that fit the optimizer."""
    layout, made = optimizer.layout, []
    for member in range(members):
        generator = np.random.default_rng([seed, round, member])
        keys = generator.random((layout.blocks, 4096))
        indices = np.sort(np.argsort(keys, axis=1)[:, : layout.topk], axis=1).astype(np.uint16)
        update = Update(RUN, round, member, indices, generator.random(indices.shape) < 0.5)
        made.append(encode(update, layout))
    return made


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
    for lr in (0.00317, rate_bits(0.00317)):
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


def momentum_after(make: Make, fate: str, when: str) -> torch.Tensor:
    """Momentum after rounds 0 and 1; `early`: the fate of round 0's update is known before round 1 is encoded."""
    named = make()
    optimizer = DisTrO(named, lr=0.01, decay=0.9, topk=32)
    blobs: list[bytes] = []
    for round in (0, 1):
        give_gradients(named, round)
        blobs.append(optimizer.encode(run=RUN, round=round, member=0))
        if (round == 0) == (when == "early") and fate != "kept":
            optimizer.restore(blobs[0]) if fate == "restored" else optimizer.apply([blobs[0]])
    return optimizer.state_dict()["momentum"].clone()


def test_restore_puts_back_what_was_taken_out(make: Make) -> None:
    """To apply changes nothing about the own momentum; to restore late is to add what decay has left."""
    applied = [momentum_after(make, "applied", when) for when in ("early", "late")]
    kept = momentum_after(make, "kept", "late")
    assert torch.equal(applied[0], kept)
    assert torch.equal(applied[1], kept)
    named = make()
    optimizer = DisTrO(named, lr=0.01, decay=0.9, topk=32)
    give_gradients(named, 0)
    blob = optimizer.encode(run=RUN, round=0, member=0)
    without = optimizer.state_dict()["momentum"].clone()
    optimizer.restore(blob)
    whole = optimizer.state_dict()["momentum"]
    assert ((whole - without != 0).sum(dim=1) == 32).all()
    late = momentum_after(make, "restored", "late")
    assert torch.allclose(late - kept, 0.9 * (whole - without), atol=1e-7)
    early = momentum_after(make, "restored", "early")
    assert not torch.equal(early, late), "put back early, it competes for a place in the next update"


def test_fates_are_decided_once(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    give_gradients(named, 0)
    blob = optimizer.encode(run=RUN, round=7, member=0)
    assert optimizer.travelling == {7: blob}
    with pytest.raises(OptimizerError, match="round 7 was encoded already"):
        optimizer.encode(run=RUN, round=7, member=0)
    strangers = encode(Update(RUN, 7, 1, *_votes(blob, optimizer)), optimizer.layout)
    with pytest.raises(UnknownRound, match=r"round 7 by member 1 is kept \(rounds kept: 7\)"):
        optimizer.restore(strangers)
    optimizer.apply([strangers])
    assert list(optimizer.travelling) == [7], "the update of another member decides nothing"
    votes = _votes(blob, optimizer)
    forged = encode(Update(RUN, 7, 0, votes[0], ~votes[1]), optimizer.layout)
    optimizer.apply([forged])
    assert optimizer.travelling == {7: blob}, "other bytes under the same round and member decide nothing either"
    with pytest.raises(UnknownRound):
        optimizer.restore(forged)
    optimizer.apply([blob])
    with pytest.raises(UnknownRound, match="kept: none"):
        optimizer.restore(blob)


def test_a_header_names_an_update_to_restore(make: Make) -> None:
    """Who keeps no copy of its update restores the same."""
    after = []
    for by_header in (False, True):
        named = make()
        optimizer = DisTrO(named, lr=0.01, topk=32)
        give_gradients(named, 0)
        blob, header = optimizer.encode(run=RUN, round=7, member=2), Header(RUN, 7, 2)
        for other in (Header(RUN, 7, 1), Header(RUN, 6, 2), Header(bytes(32), 7, 2)):
            with pytest.raises(UnknownRound):
                optimizer.restore(other)
        optimizer.restore(header if by_header else blob)
        with pytest.raises(UnknownRound, match="kept: none"):
            optimizer.restore(header)
        after.append(optimizer.state_dict()["momentum"])
    assert torch.equal(*after)


def _votes(blob: bytes, optimizer: DisTrO) -> tuple[np.ndarray, np.ndarray]:
    update = decode(blob, optimizer.layout)
    return update.indices, update.signs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e35])
def test_a_gradient_that_is_not_finite_changes_nothing(make: Make, bad: float) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    give_gradients(named, 0)
    optimizer.encode(run=RUN, round=0, member=0)
    before = optimizer.state_dict()["momentum"].clone()
    give_gradients(named, 1)
    dict(named)["long"].grad[4999] = bad
    with pytest.raises(NonFiniteGradient, match="gradient of long"):
        optimizer.encode(run=RUN, round=1, member=0)
    assert torch.equal(optimizer.state_dict()["momentum"], before)
    give_gradients(named, 1)
    optimizer.encode(run=RUN, round=1, member=0)


def test_blocks_without_gradient_cancel_out(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=8)
    blobs = [optimizer.encode(run=RUN, round=r, member=m) for r, m in ((0, 0), (1, 1))]
    signs = [decode(blob, optimizer.layout).signs for blob in blobs]
    assert np.array_equal(signs[0], signs[1])
    other = decode(optimizer.encode(run=RUN, round=2, member=1), optimizer.layout)
    assert np.array_equal(other.signs, ~signs[0])


def test_tied_and_frozen_parameters(make: Make) -> None:
    named = make()
    named[1][1].requires_grad_(False)
    optimizer = DisTrO([*named, ("again", named[0][1])], lr=0.01)
    assert {name for name, _ in optimizer.shapes} == {name for name, _ in named} - {"square"}
    assert optimizer.layout.numel == sum(p.numel() for _, p in named) - named[1][1].numel()


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ([], "no parameter requires a gradient"),
        ([("a", torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))], "a is torch.float64"),
        ([("a", torch.nn.Parameter(torch.zeros(3, 4).t()))], "a is not contiguous"),
        (
            [("a", torch.nn.Parameter(torch.zeros(3))), ("a", torch.nn.Parameter(torch.zeros(3)))],
            "two different parameters are called a",
        ),
    ],
)
def test_parameters_that_cannot_be_trained_are_named(named: Named, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DisTrO(named, lr=0.01)


def test_low_precision_parameters_have_fp32_masters(make: Make) -> None:
    """Steps far below the resolution of bf16 add up, and replicas in bf16 and fp32 hold the same weights."""
    coarse, fine = (
        make(dtype=torch.bfloat16),
        [(n, torch.nn.Parameter(p.detach().bfloat16().float())) for n, p in make()],
    )
    a, b = DisTrO(coarse, lr=1e-4, topk=8), DisTrO(fine, lr=1e-4, topk=8)
    for round in range(20):
        blobs = updates(a, 3, round)
        a.apply(blobs, lr=1e-4)
        b.apply(blobs, lr=1e-4)
    assert a.fingerprint() == b.fingerprint()
    for (_, x), (_, y) in zip(coarse, fine, strict=True):
        assert torch.equal(x, y.bfloat16())
    assert bits(coarse) != bits(make(dtype=torch.bfloat16))


def test_fingerprint_notices_one_bit_and_sums_by_definition(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01)
    first = optimizer.fingerprint()
    assert 0 <= first < 1 << 64
    weights = dict(named)["ragged"].detach().view(torch.int32)
    for bit in (0, 13, 31):
        weights[69, 129] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
        assert optimizer.fingerprint() != first
        weights[69, 129] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert optimizer.fingerprint() == first

    one = torch.nn.Parameter(torch.tensor([[1.5, -2.0]]))
    optimizer = DisTrO([("w", one)], lr=0.01)
    mask, state, drawn = (1 << 64) - 1, int.from_bytes(optimizer.layout.digest[:8], "little"), []
    for _ in range(4097):  # SplitMix64 as published
        state = (state + 0x9E3779B97F4A7C15) & mask
        x = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        drawn.append((x ^ (x >> 31)) | 1)
    words = struct.unpack("<2I", struct.pack("<2f", 1.5, -2.0))
    assert optimizer.fingerprint() == (words[0] * drawn[0] + words[1] * drawn[1]) * drawn[4096] & mask


def test_state_survives_a_restart_to_the_same_bytes(make: Make) -> None:
    def play(optimizer: DisTrO, named: Named, rounds: range) -> bytes:
        blob = b""
        for round in rounds:
            give_gradients(named, round)
            blob = optimizer.encode(run=RUN, round=round, member=1)
            if round:
                before = optimizer.travelling[round - 1]
                optimizer.restore(before) if round == 2 else optimizer.apply([before])
        return blob

    for dtype in (torch.float32, torch.bfloat16):
        named = make(dtype=dtype)
        optimizer = DisTrO(named, lr=0.01, topk=16)
        play(optimizer, named, range(3))
        optimizer.apply(updates(optimizer, 2), lr=0.01)
        saved = copy.deepcopy(optimizer.state_dict())
        fresh = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
        again = DisTrO(fresh, lr=0.5, topk=16)
        again.load_state_dict(saved)
        assert again.fingerprint() == optimizer.fingerprint()
        assert play(optimizer, named, range(3, 5)) == play(again, fresh, range(3, 5))
    with pytest.raises(ValueError, match="model or topk differ"):
        DisTrO(make(), lr=0.01, topk=17).load_state_dict(saved)


def test_a_state_that_does_not_fit_changes_nothing(make: Make) -> None:
    named = make()
    optimizer = DisTrO(named, lr=0.01, topk=16)
    optimizer.apply(updates(optimizer, 2))
    good = copy.deepcopy(optimizer.state_dict())
    receiver = DisTrO(make(), lr=0.01, topk=16)
    before = copy.deepcopy(receiver.state_dict())
    for change, text in (
        ({key: value for key, value in good.items() if key != "trend"}, "has no 'trend'"),
        (good | {"momentum": good["momentum"][1:]}, "start as many processes, sharded alike"),
        (good | {"blocks": good["blocks"] + 1}, "start as many processes, sharded alike"),
        (good | {"param_groups": good["param_groups"] * 2}, "has 2 parameter groups, not 1"),
        (good | {"masters": {"square": torch.zeros(64, 128)}}, "sharded alike"),
    ):
        with pytest.raises(ValueError, match=text):
            receiver.load_state_dict(change)
        after = receiver.state_dict()
        assert torch.equal(after["trend"], before["trend"])
        assert torch.equal(after["momentum"], before["momentum"])
    receiver.load_state_dict(good)
    assert torch.equal(receiver.state_dict()["trend"], good["trend"])


@pytest.mark.parametrize("convert", ["bfloat16", "channels_last", "resized"])
def test_a_model_converted_afterwards_is_refused(convert: str) -> None:
    """Kernels write by address: what was fp32 and contiguous must still be."""
    model = torch.nn.Conv2d(8, 8, 3)
    optimizer = DisTrO(model.named_parameters(), lr=0.01, topk=8)
    blob = optimizer.encode()
    if convert == "bfloat16":
        model.bfloat16()
    elif convert == "channels_last":
        model.to(memory_format=torch.channels_last)
    else:
        model.weight.data = torch.zeros(4, 8, 3, 3)
    with pytest.raises(
        OptimizerError, match=r"weight was torch\.float32 .* convert the model before making the optimizer"
    ):
        optimizer.apply([blob])


def test_the_default_type_of_torch_does_not_matter(make: Make) -> None:
    blobs = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        named = make()
        give_gradients(named, 1)
        torch.set_default_dtype(dtype)
        try:
            optimizer = DisTrO(named, lr=0.01, topk=8)
            blobs.append(optimizer.encode())
            with optimizer.lookahead():
                optimizer.report()
            optimizer.apply([blobs[-1]])
        finally:
            torch.set_default_dtype(torch.float32)
    assert blobs[0] == blobs[1] == blobs[2]


def test_flushed_subnormals_are_refused(make: Make) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(ValueError, match="subnormal numbers are flushed"):
            DisTrO(make(), lr=0.01)
    finally:
        torch.set_flush_denormal(False)


def test_gathering_of_low_precision_gradients(make: Make) -> None:
    coarse, fine = make(dtype=torch.bfloat16), make()
    a, b = DisTrO(coarse, lr=0.01), DisTrO(fine, lr=0.01)
    give_gradients(coarse, 3)
    for (_, x), (_, y) in zip(coarse, fine, strict=True):
        y.grad = x.grad.float()
    assert a.encode(run=RUN, round=0, member=0) == b.encode(run=RUN, round=0, member=0)
