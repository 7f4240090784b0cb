"""The codec: known bytes, round trips, one encoding per update, and a decoder that survives anything."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.codec import Update, decode, encode, encode_blocks, validate
from optimizer.errors import MalformedUpdate
from optimizer.layout import BLOCK, HEADER_BYTES, BlockCode, Layout

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "update.json").read_text())
TOPKS = [1, 2, 3, 8, 24, 32, 100, 128, 511, 512, 1000, BLOCK]


def layout_of(topk: int, blocks: int = 3) -> Layout:
    return Layout.build([("w", (64 * blocks, 64))], topk)


def random_update(layout: Layout, seed: int, extreme: bool = False) -> Update:
    generator = np.random.default_rng(seed)
    pool = BLOCK if not extreme else min(BLOCK, layout.topk + 1)
    rows = [np.sort(generator.choice(pool, layout.topk, replace=False)) for _ in range(layout.blocks)]
    indices = np.array(rows, np.uint16)
    if extreme:
        indices += np.uint16(BLOCK - pool)
    signs = generator.random(indices.shape) < 0.5
    return Update(generator.bytes(32), int(generator.integers(2**63)), seed % 256, indices, signs)


def same(a: Update, b: Update) -> bool:
    return a.header == b.header and np.array_equal(a.indices, b.indices) and np.array_equal(a.signs, b.signs)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
def test_known_bytes(vector: dict) -> None:
    layout = Layout.build([(name, tuple(shape)) for name, shape in vector["shapes"]], vector["topk"])
    assert layout.digest.hex() == vector["layout_digest"]
    blob = bytes.fromhex(vector["update"])
    update = decode(blob, layout)
    assert update.header.run.hex() == vector["run"]
    assert (update.round, update.member) == (vector["round"], vector["member"])
    assert update.indices.tolist() == vector["indices"]
    assert update.signs.astype(int).tolist() == vector["signs"]
    assert encode(update, layout) == blob


def test_a_block_by_hand() -> None:
    """topk 2: 11 low bits per index, a bitmap of 2 + 2 bits, 2 signs, 4 zeros: written out by the definition."""
    bits = "10000000000" + "11111111111" + "1010" + "01" + "0000"
    assert len(bits) == 32
    code = encode_blocks(np.array([[1, 4095]], np.uint16), np.array([[False, True]]), BlockCode(2))
    assert code.tobytes() == int(bits[::-1], 2).to_bytes(4, "little")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TOPKS), st.integers(0, 2**32), st.booleans())
def test_round_trip(topk: int, seed: int, extreme: bool) -> None:
    layout = layout_of(topk)
    update = random_update(layout, seed, extreme)
    blob = encode(update, layout)
    assert len(blob) == layout.update_bytes
    assert same(decode(memoryview(blob), layout), update)
    assert validate(bytearray(blob), layout) == update.header


@pytest.mark.parametrize("topk", [1, 3, 8, 32, 100, 512])
def test_every_single_bit_matters(topk: int) -> None:
    """A blob with one bit changed is rejected, or is the one encoding of a different update."""
    layout = layout_of(topk, blocks=1)
    update = random_update(layout, 1)
    blob = encode(update, layout)
    accepted = 0
    for bit in range(len(blob) * 8):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            other = decode(changed, layout)
        except MalformedUpdate:
            continue
        accepted += 1
        assert not same(other, update)
        assert encode(other, layout) == changed
    assert accepted >= (32 + 8 + 4) * 8 + topk  # run, round, member and every sign
    assert accepted < len(blob) * 8 - 32 * 8  # never the layout's digest


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1, 2, 3, 8, 32]), st.data())
def test_whatever_is_accepted_is_canonical(topk: int, data: st.DataObject) -> None:
    """Any bytes behind a good header, so that the checks of the body are reached. Few bits set, so that some pass."""
    layout = layout_of(topk, blocks=1)
    header = encode(random_update(layout, 0), layout)[:HEADER_BYTES]
    size = layout.code.bytes
    body = data.draw(st.binary(min_size=size, max_size=size))
    try:
        update = decode(header + body, layout)
    except MalformedUpdate:
        return
    assert encode(update, layout) == header + body


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_refused_with_a_reason(junk: bytes) -> None:
    with pytest.raises(MalformedUpdate, match=r"malformed update: ."):
        decode(junk, layout_of(32))


def at(blob: bytes, offset: int, new: bytes) -> bytes:
    return blob[:offset] + new + blob[offset + len(new) :]


def test_reasons() -> None:
    layout = layout_of(2)
    good = encode(random_update(layout, 5), layout)
    body = HEADER_BYTES + layout.code.bytes  # of block 1

    def block(bits: str) -> bytes:
        return at(good, body, int(bits[::-1], 2).to_bytes(4, "little"))

    one, two = "10000000000", "01000000000"
    cases = {
        "has 107 bytes; an update of this layout has 108": good[:-1],
        "has 109 bytes": good + b"\0",
        "begins with b'psyu'": at(good, 0, b"psyu"),
        "version is 2": at(good, 4, b"\2"),
        "topk is 3": at(good, 6, b"\3"),
        "header says 109 bytes": at(good, 8, b"\x6d"),
        "reserved bytes": at(good, 28, b"\1"),
        "of layout 0000": at(good, 64, bytes(32)),
        "block 1: its bitmap does not have 2 bits set": block(one + two + "1000" + "00" + "0000"),
        "block 1: the bits after the signs are not zero": block(one + two + "1100" + "00" + "0001"),
        "block 1: an index is beyond 4095": block(one + two + "1001" + "00" + "0000"),
        "block 1: its indices are not strictly ascending": block(two + one + "1100" + "00" + "0000"),
    }
    for reason, blob in cases.items():
        with pytest.raises(MalformedUpdate, match=reason):
            decode(blob, layout)
    with pytest.raises(MalformedUpdate, match="not strictly ascending"):
        decode(block(one + one + "1100" + "00" + "0000"), layout)


def test_encode_refuses_what_does_not_fit() -> None:
    layout = layout_of(2)
    good = random_update(layout, 3)
    for indices in (good.indices[:, ::-1], np.full_like(good.indices, 7), good.indices[:-1], good.indices.astype(int)):
        with pytest.raises(ValueError, match="indices"):
            encode(Update(good.run, 0, 0, indices, good.signs), layout)
    too_far = np.array([[1, 4096]] * 3, np.uint16)
    for run, number, member, indices in (
        (b"short", 0, 0, good.indices),
        (good.run, -1, 0, good.indices),
        (good.run, 0, 1 << 32, good.indices),
        (good.run, 0, 0, too_far),
    ):
        with pytest.raises(ValueError, match=r"32 bytes|does not fit|ascending"):
            encode(Update(run, number, member, indices, good.signs), layout)


def test_many_blocks_are_decoded_in_slabs() -> None:
    layout = layout_of(8, blocks=5000)
    update = random_update(layout, 9)
    blob = encode(update, layout)
    assert same(decode(blob, layout), update)
    last = HEADER_BYTES + 4999 * layout.code.bytes
    with pytest.raises(MalformedUpdate, match="block 4999: "):
        validate(at(blob, last, struct.pack("<12s", bytes(12))), layout)


def test_layout_and_codec_do_not_import_torch() -> None:
    program = (
        "import sys; import optimizer.layout, optimizer.codec; from optimizer import decode, Layout, Update; "
        "assert 'torch' not in sys.modules; from optimizer import DisTrO; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
