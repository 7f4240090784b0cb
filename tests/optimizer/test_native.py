"""The compiled kernels against their definition in numpy: equal bits, on every instruction set of this machine."""

import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer import native
from optimizer.errors import MalformedUpdate
from optimizer.geometry import PIECE
from optimizer.layout import BLOCK, SIDE, BlockCode
from optimizer.plain_codec import decode_blocks, encode_blocks

TOPKS = [1, 2, 3, 8, 31, 32, 100, 128, 256, 512, 1000, BLOCK]
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
Array = NDArray[np.float32]

if not native.available() and shutil.which(COMPILER) is None:
    pytest.skip(f"no C compiler ({COMPILER}) here: {native.reason()}", allow_module_level=True)


@pytest.fixture(params=native.isas() or ("none",))
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    assert native.available(), native.reason()
    return native.kernels(request.param)


# ---- the definition ----


def butterflies(blocks: NDArray) -> NDArray:
    """(N, 4096): (a, b) -> (a + b, a - b), strides ascending."""
    stride = 1
    while stride < BLOCK:
        pairs = blocks.reshape(len(blocks), -1, 2, stride)
        blocks = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        blocks = blocks.reshape(len(blocks), BLOCK)
        stride *= 2
    return blocks


def widened(tensor: NDArray) -> Array:
    return (tensor.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == np.uint16 else tensor


def narrowed(values: Array) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def places(pieces: NDArray) -> list[tuple[int, NDArray, NDArray]]:
    """Of each piece: its tensor, its values' numbers in the slab, their elements in the tensor."""
    found = []
    for piece in pieces:
        r, c = np.arange(piece["rows"])[:, None], np.arange(piece["cols"])[None, :]
        within = int(piece["block"]) * BLOCK + int(piece["offset"]) + SIDE * r + c
        found.append((int(piece["tensor"]), within.ravel(), (piece["start"] + piece["stride"] * r + c).ravel()))
    return found


def gathered(pieces: NDArray, tensors: Sequence[NDArray | None], count: int) -> Array:
    blocks = np.zeros(count * BLOCK, np.float32)
    for tensor, within, elements in places(pieces):
        source = tensors[tensor]
        if source is not None:
            blocks[within] = widened(source)[elements]
    return blocks.reshape(count, BLOCK)


def selected(block: Array, topk: int) -> NDArray[np.uint16]:
    return np.sort(np.argsort(-np.abs(block), kind="stable")[:topk]).astype(np.uint16)


def mean(values: Array) -> np.float32:
    padded = np.zeros(1 << (len(values) - 1).bit_length(), np.float32)
    padded[: len(values)] = values
    while len(padded) > 1:
        padded = padded[: len(padded) // 2] + padded[len(padded) // 2 :]
    return padded[0] / np.float32(len(values))


def moved(momentum: Array, body: NDArray, amounts: Array, code: BlockCode) -> None:
    indices, signs = decode_blocks(body, code, range(len(body)))
    for block, at, negative, amount in zip(momentum, indices, signs, amounts, strict=True):
        block[at] += np.where(negative, -amount, amount)


def encoded(
    momentum: Array, gradient: Array, decay: float, rate: float, code: BlockCode, salt: int
) -> tuple[Array, NDArray[np.uint8], Array]:
    """Momentum before the own message leaves it, body, scale."""
    momentum = np.float32(decay) * momentum + np.float32(rate) * butterflies(gradient)
    indices = np.stack([selected(block, code.topk) for block in momentum])
    kept = np.take_along_axis(momentum, indices.astype(np.int64), axis=1)
    signs = np.where(kept == 0, (indices + np.uint32(salt)) & 1 == 1, kept < 0)
    return momentum, encode_blocks(indices, signs, code), np.array([mean(np.abs(row)) for row in kept])


def votes(bodies: Sequence[NDArray], code: BlockCode, limit: int) -> NDArray[np.int64]:
    total = np.zeros((len(bodies[0]), BLOCK), np.int64)
    for body in bodies:
        indices, signs = decode_blocks(body, code, range(len(body)))
        for row, at, negative in zip(total, indices, signs, strict=True):
            row[at] += np.where(negative, -1, 1)
    return total.clip(-limit, limit) if limit else total


def same_bits(a: NDArray, b: NDArray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- what it is tried on ----

COUNT = 9


@dataclass
class Case:
    """A slab with whole tiles, edges, a run of a vector, a shared block, an empty one; tensors and their gradients."""

    pieces: NDArray
    weights: list[Array]
    gradients: list[NDArray | None]


def pieces_of_case() -> NDArray:
    whole = [(0, block, 0, 64, 64, 0, 64 * (block % 2) + 64 * 130 * (block // 2), 130) for block in range(2)]
    edge = [(0, 2, 0, 64, 2, 0, 128, 130), (0, 3, 0, 6, 64, 0, 64 * 130, 130), (0, 4, 0, 6, 2, 0, 64 * 130 + 128, 130)]
    runs = [(1, 5, 0, 1, BLOCK, 0, 3, 0), (1, 6, 0, 1, 905, 0, 3 + BLOCK, 0)]
    shared = [(2, 7, 0, 1, 70, 0, 0, 0), (3, 7, 70, 1, 1, 0, 1, 0), (4, 7, 72, 1, 4000, 0, 0, 0)]
    return np.array(whole + edge + runs + shared, PIECE)


def values(seed: int, kind: str, *shape: int) -> Array:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.standard_normal(shape, np.float32)
    if kind == "ties":
        return rng.choice(np.array([-1, -0.5, -0.0, 0.0, 0.5, 1], np.float32), shape)
    if kind == "wild":
        return np.ldexp(rng.standard_normal(shape, np.float32), rng.integers(-149, 60, shape)).astype(np.float32)
    return rng.choice(np.array([-0.0, 0.0], np.float32), shape)


def make_case(seed: int, kind: str) -> Case:
    sizes = [70 * 130, 3 + BLOCK + 905, 70, 2, 4000]
    weights = [values(seed + i, "normal", size) for i, size in enumerate(sizes)]
    gradients: list[NDArray | None] = [values(seed + 9 + i, kind, size) for i, size in enumerate(sizes)]
    gradients[2] = None
    gradients[1] = narrowed(values(seed + 8, kind, sizes[1]))
    gradients[4] = narrowed(values(seed + 7, kind, sizes[4]))
    return Case(pieces_of_case(), weights, gradients)


def located(tensors: Sequence[NDArray | None]) -> native.Tensors:
    dtypes = [native.BF16 if t is not None and t.dtype == np.uint16 else native.FP32 for t in tensors]
    return native.Tensors(addresses(tensors), np.array(dtypes, np.uint8))


def addresses(tensors: Sequence[NDArray | None]) -> NDArray[np.uintp]:
    return np.array([0 if t is None else t.ctypes.data for t in tensors], np.uintp)


def random_rows(seed: int, count: int, code: BlockCode) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Indices and signs; in every other block as close together as possible, at the one end or the other."""
    rng = np.random.default_rng(seed)
    rows = []
    for block in range(count):
        pool = BLOCK if block % 2 else min(BLOCK, code.topk + 1)
        row = np.sort(rng.choice(pool, code.topk, replace=False))
        rows.append(row + (BLOCK - pool if block % 4 == 0 else 0))
    return np.array(rows, np.uint16), rng.random((count, code.topk)) < 0.5


def random_body(seed: int, count: int, code: BlockCode) -> NDArray[np.uint8]:
    return encode_blocks(*random_rows(seed, count, code), code)


# ---- encode ----


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wild"])
@pytest.mark.parametrize("topk", TOPKS)
def test_encode(kernels: native.Kernels, topk: int, kind: str) -> None:
    code, case = BlockCode(topk), make_case(topk, kind)
    momentum = values(topk + 50, kind, COUNT, BLOCK)
    momentum[8] = 0
    for salt in (0, 2**32 - 5):
        gradient = gathered(case.pieces, case.gradients, COUNT)
        expected, expected_body, expected_scale = encoded(momentum.copy(), gradient, 0.875, 0.005 / 64, code, salt)
        total = np.square(expected.astype(np.float64)).sum()
        indices, _ = decode_blocks(expected_body, code, range(COUNT))
        kept = np.square(np.take_along_axis(expected, indices.astype(np.int64), axis=1).astype(np.float64)).sum()
        moved(expected, expected_body, -expected_scale, code)

        actual, body, scale = momentum.copy(), np.full((COUNT, code.bytes), 255, np.uint8), np.empty(COUNT, np.float32)
        energy = kernels.encode(
            case.pieces,
            located(case.gradients),
            actual,
            decay=0.875,
            rate=0.005 / 64,
            code=code,
            salt=salt,
            body=body,
            scale=scale,
        )
        assert same_bits(body, expected_body)
        assert same_bits(scale, expected_scale)
        assert same_bits(actual, expected)
        assert energy.kept <= energy.total * (1 + 1e-5)
        assert energy == pytest.approx((total, kept), rel=1e-4, abs=1e-30)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, BLOCK), st.integers(0, 2**32), st.integers(1, 40), st.booleans())
def test_selection_is_exact_whatever_the_ties(topk: int, seed: int, distinct: int, close: bool) -> None:
    """Values from a small set: neighbouring floats, or far apart; the rest of encode is taken out of the way."""
    rng = np.random.default_rng(seed)
    pool = (rng.integers(2**20, 2**20 + 50 if close else 2**30, distinct) * rng.choice([0, 1, 1], distinct)).astype(
        "i4"
    )
    magnitudes = rng.choice(pool, (2, BLOCK), p=rng.dirichlet(np.ones(distinct)))
    momentum = (magnitudes | (rng.integers(0, 2, magnitudes.shape) << 31)).astype(np.uint32).view(np.float32)
    code, none = BlockCode(topk), native.Tensors(np.zeros(1, np.uintp), np.zeros(1, np.uint8))
    expected, expected_body, expected_scale = encoded(momentum, np.zeros_like(momentum), 1.0, 1.0, code, 3)
    moved(expected, expected_body, -expected_scale, code)
    for isa in native.isas():
        body, scale, actual = np.empty((2, code.bytes), np.uint8), np.empty(2, np.float32), momentum.copy()
        native.kernels(isa).encode(
            np.empty(0, PIECE), none, actual, decay=1.0, rate=1.0, code=code, salt=3, body=body, scale=scale
        )
        assert same_bits(body, expected_body)
        assert same_bits(actual, expected)
        assert same_bits(scale, expected_scale)


@pytest.mark.parametrize("topk", [1, 32, 1000])
def test_add(kernels: native.Kernels, topk: int) -> None:
    code = BlockCode(topk)
    body, scale, momentum = random_body(1, 5, code), values(2, "normal", 5), values(3, "normal", 5, BLOCK)
    expected = momentum.copy()
    moved(expected, body, scale * np.float32(0.3), code)
    kernels.add(momentum, body, scale, 0.3, code)
    assert same_bits(momentum, expected)


# ---- apply, preview ----


def trends(seed: int) -> NDArray[np.int16]:
    """Of every size, with zeros and both ends of the range."""
    rng = np.random.default_rng(seed)
    made = (rng.integers(-(2**15), 2**15, (COUNT, BLOCK)) >> rng.integers(0, 15, (COUNT, BLOCK))).astype(np.int16)
    made[0, :4] = 32767, -32767, 0, -1
    return made


def followed(trend: NDArray[np.int16], u: NDArray[np.int64] | int, window: int) -> NDArray[np.int16]:
    held = trend.astype(np.int64)
    leak = np.sign(held) * -(-np.abs(held) // 2**window)
    return (held - leak + 8 * u).clip(-32767, 32767).astype(np.int16)


@pytest.mark.parametrize("topk", TOPKS)
@pytest.mark.parametrize(("members", "limit", "window"), [(1, 0, 0), (3, 1, 3), (8, 0, 8), (9, 7, 2), (12, 8, 15)])
def test_apply(kernels: native.Kernels, topk: int, members: int, limit: int, window: int) -> None:
    code, case = BlockCode(topk), make_case(2, "normal")
    bodies = [random_body(10 + m % 5, COUNT, code) for m in range(members)]
    u = butterflies(votes(bodies, code, limit))
    out = np.empty((COUNT, BLOCK), np.int32)
    kernels.inverse(bodies, code, limit, out)
    assert same_bits(out, u.astype(np.int32))

    rates, shares = np.array([0.1, 0.2, 0.0, 0.4, 0.5], np.float32), np.array([1, 0.99, 1, 0.5, 0.9], np.float32)
    case.weights[2][3] = -0.0
    trend = trends(topk)
    next_trend = followed(trend, u, window)
    expected = [weights.copy() for weights in case.weights]
    for tensor, within, elements in places(case.pieces):
        steps = np.sign(next_trend).astype(np.float32).ravel()[within] * rates[tensor] + np.float32(0)
        expected[tensor][elements] = case.weights[tensor][elements] * shares[tensor] - steps
    kernels.apply(
        case.pieces, addresses(case.weights), trend, bodies,
        code=code, limit=limit, window=window, rates=rates, shares=shares,
    )  # fmt: skip
    assert same_bits(trend, next_trend)
    assert all(map(same_bits, case.weights, expected))


@pytest.mark.parametrize("members", [0, 1, 3])
@pytest.mark.parametrize("window", [0, 3])
def test_preview(kernels: native.Kernels, members: int, window: int) -> None:
    code, case = BlockCode(32), make_case(1, "normal")
    rates = np.array([0.1, 0.2, 0.3, 0.4, 0.0], np.float32)
    case.weights[1][7] = np.nan
    case.weights[0][3:5] = -0.0, np.inf
    bodies = [random_body(m, COUNT, code) for m in range(members)]
    u = butterflies(votes(bodies, code, 0)) if members else 0
    trend = trends(members)
    steps = np.sign(followed(trend, u, window)).astype(np.float32).ravel()
    out: list[NDArray] = [
        np.full(w.shape, 7, np.uint16 if i in (1, 4) else np.float32) for i, w in enumerate(case.weights)
    ]
    expected = [tensor.copy() for tensor in out]
    for tensor, within, elements in places(case.pieces):
        ahead = case.weights[tensor][elements] - (steps[within] * rates[tensor] + np.float32(0))
        bf16 = np.where(np.isnan(ahead), np.uint16(0x7FC0), narrowed(ahead))
        expected[tensor][elements] = bf16 if tensor in (1, 4) else ahead
    before = trend.copy()
    kernels.preview(
        case.pieces, addresses(case.weights), located(out), trend, bodies, code=code, window=window, rates=rates
    )
    assert all(map(same_bits, out, expected))
    assert same_bits(trend, before)


def test_the_largest_sums_fit(kernels: native.Kernels) -> None:
    """Everyone votes for everything: the extreme sum of both integer widths, at the bound between them."""
    code = BlockCode(BLOCK)
    body = encode_blocks(np.arange(BLOCK, dtype=np.uint16)[None], np.ones((1, BLOCK), np.bool_), code)
    out = np.empty((1, BLOCK), np.int32)
    for members, limit, largest in ((7, 0, 7), (8, 0, 8), (9, 7, 7), (9, 8, 8), (300, 0, 300), (32767, 0, 32767)):
        kernels.inverse([body] * members, code, limit, out)
        assert out[0, 0] == -BLOCK * largest
        assert not out[0, 1:].any()


# ---- codec ----


@pytest.mark.parametrize("topk", [*TOPKS, 2048, 2049, 4095])
def test_codec(kernels: native.Kernels, topk: int) -> None:
    code = BlockCode(topk)
    indices, signs = random_rows(topk, 12, code)
    body = encode_blocks(indices, signs, code)
    assert same_bits(kernels.encode_blocks(indices, signs, code), body)
    decoded = kernels.decode(body, code)
    assert decoded is not None
    assert same_bits(decoded[0], indices)
    assert same_bits(decoded[1], signs)
    assert kernels.valid(body, code)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1, 2, 3, 8, 31, 32, 100, 128, BLOCK]), st.integers(0, 100), st.data())
def test_the_decoders_agree_on_anything(topk: int, seed: int, data: st.DataObject) -> None:
    code = BlockCode(topk)
    body = random_body(seed, 3, code)
    bits = data.draw(st.lists(st.integers(0, code.bytes * 8 - 1), max_size=4))
    for bit in bits:
        body[1, bit // 8] ^= 1 << bit % 8
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, code.bytes - 1))
        junk = data.draw(st.binary(max_size=code.bytes - start))
        body[1, start : start + len(junk)] = np.frombuffer(junk, np.uint8)
    try:
        expected = decode_blocks(body, code, range(3))
    except MalformedUpdate:
        expected = None
    for isa in native.isas():
        decoded = native.kernels(isa).decode(body, code)
        assert native.kernels(isa).valid(body, code) == (expected is not None)
        assert (decoded is None) == (expected is None)
        if decoded is not None and expected is not None:
            assert all(map(same_bits, decoded, expected))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 3, 8, 32, 100, 2049, BLOCK]), st.integers(0, 2**32))
def test_any_bytes_are_safe(topk: int, seed: int) -> None:
    """Rows that were never validated stay within the block: what lies around it is untouched."""
    code, rng = BlockCode(topk), np.random.default_rng(seed)
    body = rng.integers(0, 256, (2, code.bytes), np.uint8) | rng.integers(0, 256, code.bytes, np.uint8)
    for isa in native.isas():
        kernels, around = native.kernels(isa), np.zeros((4, BLOCK), np.float32)
        kernels.add(around[1:3], body, np.ones(2, np.float32), 1.0, code)
        assert not around[0].any()
        assert not around[3].any()
        whole = np.array([(0, 0, 0, 64, 64, 0, BLOCK, 64), (0, 1, 0, 64, 64, 0, 2 * BLOCK, 64)], PIECE)
        one = np.ones(1, np.float32)
        trend = np.zeros((2, BLOCK), np.int16)
        kernels.apply(
            whole, addresses([around]), trend, [body, body], code=code, limit=1, window=3, rates=one, shares=one
        )
        assert not around[0].any()
        assert not around[3].any()


# ---- checksums ----


def test_fingerprint(kernels: native.Kernels) -> None:
    case, rng = make_case(4, "normal"), np.random.default_rng(4)
    within = rng.integers(0, 2**64, BLOCK, np.uint64)
    of_blocks = rng.integers(0, 2**64, COUNT, np.uint64)
    bits = gathered(case.pieces, case.weights, COUNT).view(np.uint32).astype(np.uint64)
    expected = int(((bits * within).sum(axis=1, dtype=np.uint64) * of_blocks).sum(dtype=np.uint64))
    assert kernels.fingerprint(case.pieces, addresses(case.weights), within, of_blocks) == expected


# ---- the interface ----


def test_pieces_that_do_not_fit_are_refused(kernels: native.Kernels) -> None:
    weights = np.zeros(2 * BLOCK, np.float32)
    good = (0, 1, 0, 64, 64, 0, 0, 64)
    for position, value in ((0, 1), (0, -1), (1, 2), (1, -1), (2, 1), (2, -1), (3, 65), (3, 0), (4, 65), (4, 0)):
        bad = np.array([(*good[:position], value, *good[position + 1 :])], PIECE)
        with pytest.raises(ValueError, match="a piece leaves its block"):
            kernels.fingerprint(bad, addresses([weights]), np.zeros(BLOCK, np.uint64), np.zeros(2, np.uint64))
    unsorted = np.array([good, (0, 0, 0, 64, 64, 0, 0, 64)], PIECE)
    for pieces, tensors in ((unsorted, [weights]), (unsorted[:1], [None])):
        with pytest.raises(ValueError, match="a piece leaves its block"):
            kernels.fingerprint(pieces, addresses(tensors), np.zeros(BLOCK, np.uint64), np.zeros(2, np.uint64))


def test_arrays_that_do_not_fit_are_refused(kernels: native.Kernels) -> None:
    code = BlockCode(2)
    body, scale, momentum = random_body(1, 3, code), np.ones(3, np.float32), np.zeros((3, BLOCK), np.float32)
    with pytest.raises(ValueError, match=r"float64 of shape \(3, 4096\); it must be contiguous float32"):
        kernels.add(momentum.astype(np.float64), body, scale, 1.0, code)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not contiguous"):
        kernels.add(momentum, np.asfortranarray(body), scale, 1.0, code)
    with pytest.raises(ValueError, match=r"of shape \(3, 4\)"):
        kernels.valid(body, BlockCode(3))
    momentum.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        kernels.add(momentum, body, scale, 1.0, code)
    with pytest.raises(ValueError, match="messages must be between 1"):
        kernels.inverse([], code, 0, np.zeros((3, BLOCK), np.int32))
    with pytest.raises(ValueError, match="strictly ascending"):
        kernels.encode_blocks(np.array([[7, 7]], np.uint16), np.zeros((1, 2), np.bool_), code)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        native.Tensors(np.zeros(1, np.uintp), np.full(1, 2, np.uint8))


def test_without_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library: a reason. A broken one: another. Of another version: an error that says what to do."""

    def forget() -> None:
        for cached in (native._library, native.reason, native.kernels, native.isas):
            cached.cache_clear()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
            forget()
            assert not native.available()
            assert "install a C compiler" in native.reason()
            assert native.isas() == ()
            with pytest.raises(RuntimeError, match="not compiled"):
                native.kernels()
            (tmp_path / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
            forget()
            assert not native.available()
            assert "cannot be loaded" in native.reason()
        with monkeypatch.context() as patch:
            patch.setattr(native, "_ABI", -1)
            forget()
            with pytest.raises(native.StaleKernels, match=r"install psyche-node again \(pip install -e \."):
                native.available()
    finally:
        forget()
    with pytest.raises(RuntimeError, match="no kernels for mmx"):
        native.kernels("mmx")
