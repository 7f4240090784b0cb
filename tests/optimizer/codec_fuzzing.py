"""Mutated bytes for the decoder: in the tests a few thousand, by `make nightly` a million.

python tests/optimizer/codec_fuzzing.py 1000000
"""

import sys

import numpy as np

from optimizer import native, plain_codec
from optimizer.codec import Update, decode, encode
from optimizer.errors import MalformedUpdate
from optimizer.layout import BLOCK, HEADER_BYTES, Layout

TOPKS = [1, 2, 3, 8, 31, 32, 100, 128, 512]


def valid_blob(layout: Layout, generator: np.random.Generator) -> bytes:
    indices = np.sort(
        generator.permuted(np.tile(np.arange(BLOCK, dtype=np.uint16), (layout.blocks, 1)), axis=1)[:, : layout.topk]
    )
    signs = generator.random(indices.shape) < 0.5
    return encode(Update(generator.bytes(32), int(generator.integers(2**63)), 5, indices, signs), layout)


def mutate(blob: bytes, generator: np.random.Generator) -> bytes:
    """One of: a bit flipped, two bits exchanged, bytes written over, a random body, another length."""
    changed = np.frombuffer(blob, np.uint8).copy()
    kind, size = generator.integers(8), len(changed)
    bits = np.unpackbits(changed, bitorder="little")
    if kind < 3:
        bits[generator.integers(len(bits))] ^= 1
        return np.packbits(bits, bitorder="little").tobytes()
    if kind < 5:  # keeps the number of bits set, so that deeper checks are reached
        a, b = generator.integers(HEADER_BYTES * 8, len(bits), 2)
        bits[a], bits[b] = bits[b], bits[a]
        return np.packbits(bits, bitorder="little").tobytes()
    if kind == 5:
        start = generator.integers(size)
        changed[start : start + generator.integers(1, 9)] = generator.integers(256)
        return changed.tobytes()
    if kind == 6:
        return blob[:HEADER_BYTES] + generator.bytes(size - HEADER_BYTES)
    return blob[: generator.integers(size)] if generator.random() < 0.5 else blob + generator.bytes(3)


def fuzz(inputs: int, seed: int = 20261125) -> tuple[int, int]:
    """Try so many inputs; return how many were accepted and refused. AssertionError for the first that is wrong."""
    generator = np.random.default_rng(seed)
    layouts = [Layout.build([("w", (64, 64))], topk) for topk in TOPKS]
    goods = [valid_blob(layout, generator) for layout in layouts]
    accepted = 0
    for number in range(inputs):
        layout, good = layouts[number % len(layouts)], goods[number % len(layouts)]
        blob = mutate(good, generator)
        update = reason = None
        try:
            update = decode(blob, layout)
        except MalformedUpdate as error:
            reason = error.reason
        if len(blob) == layout.update_bytes and blob[:HEADER_BYTES] == good[:HEADER_BYTES]:
            check_body(np.frombuffer(blob, np.uint8, offset=HEADER_BYTES).reshape(1, -1), layout, update)
        accepted += update is not None
        assert reason or (update is not None and encode(update, layout) == blob), "a second encoding of one update"
    return accepted, inputs - accepted


def check_body(body: np.ndarray, layout: Layout, update: Update | None) -> None:
    """Both codecs are of one mind about a body, and see the same votes in it."""
    try:
        indices, signs = plain_codec.decode_blocks(body, layout.code, [0])
    except MalformedUpdate:
        assert update is None
    else:
        assert update is not None
        assert np.array_equal(indices, update.indices)
        assert np.array_equal(signs, update.signs)
    if native.available():
        assert native.kernels().valid(body, layout.code) == (update is not None)


if __name__ == "__main__":
    print("{} accepted, {} refused: each canonical, or with a reason".format(*fuzz(int(sys.argv[1]))))
