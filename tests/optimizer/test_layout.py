"""Layouts: where tensors lie; the digest depends on all that matters; what cannot be laid out is named."""

import hashlib
import struct
from dataclasses import replace

import pytest

from optimizer.layout import BLOCK, Layout, LayoutError


def test_small_vectors_share_blocks_and_none_straddles_two() -> None:
    layout = Layout.build([("m", (70, 130)), ("a", (4097,)), ("x", (3,)), ("y", (4094,)), ("z", (2,))], topk=4)
    where = {p.name: (p.first, p.blocks, p.offset) for p in layout.placements}
    assert where == {"a": (0, 2, 0), "m": (2, 6, 0), "x": (8, 1, 0), "y": (9, 1, 0), "z": (9, 1, 4094)}


def test_digest_is_of_names_shapes_topk_and_precision(shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    base = Layout.build(shapes, 32)
    assert Layout.build(shapes[::-1], 32) == base
    others = [
        Layout.build(shapes, 33),
        Layout.build(shapes[:-1], 32),
        Layout.build([("Ragged", (70, 130)), *shapes[1:]], 32),
        Layout.build([("ragged", (130, 70)), *shapes[1:]], 32),
        Layout.build([("ragged", (70, 130, 1)), *shapes[1:]], 32),
    ]
    assert len({base.digest, *(o.digest for o in others)}) == 6
    assert base.update_bytes == 96 + base.blocks * 40


@pytest.mark.parametrize(("topk", "size"), [(1, 2), (2, 4), (8, 12), (32, 40), (128, 128), (BLOCK, 4096 // 8 * 3)])
def test_bytes_per_block(topk: int, size: int) -> None:
    assert Layout.build([("w", (64, 64))], topk).code.bytes == size


@pytest.mark.parametrize(
    ("shapes", "topk", "text"),
    [
        ([], 8, "no tensor"),
        ([("a", (2,)), ("a", (3,))], 8, "two tensors are called 'a'"),
        ([("a", (0, 3))], 8, "every dimension must be positive"),
        ([("a", (3,))], 0, "between 1 and 4096"),
        ([("a", (3,))], 4097, "between 1 and 4096"),
    ],
)
def test_what_cannot_be_laid_out_is_named(shapes: list[tuple[str, tuple[int, ...]]], topk: int, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        Layout.build(shapes, topk)


def test_weights_in_bf16_change_the_digest_and_nothing_else() -> None:
    shapes = [("w", (70, 130)), ("b", (3,))]
    fp32, bf16 = Layout.build(shapes, 8), Layout.build(shapes, 8, only_bf16=True)
    described = struct.pack("<IIQ", 64, 8, 2) + struct.pack("<I1sI1Q", 1, b"b", 1, 3)
    described += struct.pack("<I1sI2Q", 1, b"w", 2, 70, 130)
    assert fp32.digest == hashlib.sha256(b"psyche layout 2" + described).digest()
    assert bf16.digest == hashlib.sha256(b"psyche layout 2 bf16" + described).digest()
    assert replace(bf16, digest=fp32.digest) == fp32
