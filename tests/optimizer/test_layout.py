"""Layouts: every value in exactly one place, in slabs of any size; the digest depends on all that matters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.blocks import gather, in_blocks, in_tensor
from optimizer.layout import BLOCK, Layout, LayoutError

CPU = torch.device("cpu")
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPE, min_size=1, max_size=6), st.integers(1, 20))
def test_slabs_of_any_size_hold_every_value_once(shapes: list[tuple[int, ...]], most: int) -> None:
    layout = Layout.build([(f"t{i}", shape) for i, shape in enumerate(shapes)], topk=8)
    total = sum(p.numel for p in layout.placements)
    numbers = torch.arange(1, total + 1, dtype=torch.float32).split([p.numel for p in layout.placements])
    tensors = [n.reshape(p.shape) for n, p in zip(numbers, layout.placements, strict=True)]
    whole = gather(layout.slabs(layout.blocks)[0], tensors, CPU)
    slabs = layout.slabs(most)
    assert torch.equal(whole, torch.cat([gather(slab, tensors, CPU) for slab in slabs]))
    assert [s.first for s in slabs] == [0, *np.cumsum([s.count for s in slabs])[:-1]]
    assert max(s.count for s in slabs) <= most
    found = np.sort(whole.numpy().ravel())
    assert np.array_equal(found[found > 0], np.arange(1, total + 1))

    copies = [torch.zeros_like(t) for t in tensors]
    for slab in slabs:
        blocks = whole[slab.rows]
        for region in slab.regions:
            in_tensor(copies[region.tensor], region).copy_(in_blocks(blocks, region))
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))


def test_tiles_are_where_the_docstring_says() -> None:
    layout = Layout.build([("m", (70, 130)), ("a", (4097,)), ("x", (3,)), ("y", (4094,)), ("z", (2,))], topk=4)
    where = {p.name: (p.first, p.blocks, p.offset) for p in layout.placements}
    assert where == {"a": (0, 2, 0), "m": (2, 6, 0), "x": (8, 1, 0), "y": (9, 1, 0), "z": (9, 1, 4094)}
    matrix = torch.arange(70.0 * 130).reshape(70, 130)
    blocks = gather(layout.slabs(99)[0], [None, matrix, None, None, None], CPU)
    assert blocks[2 + 1, 5, 7] == matrix[5, 64 + 7]
    assert blocks[2 + 3, 5, 7] == matrix[64 + 5, 7]
    assert blocks[2 + 5, 5, 1] == matrix[64 + 5, 128 + 1]
    assert blocks[2 + 5].count_nonzero() == 6 * 2


def test_digest_is_of_names_shapes_and_topk_alone(shapes: list[tuple[str, tuple[int, ...]]]) -> None:
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
