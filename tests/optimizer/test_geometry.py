"""Geometry: every value in one place, in slabs of any size and parts of any shape, as regions and as pieces."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.blocks import gather, in_blocks, in_tensor
from optimizer.geometry import Geometry, Part, Slab
from optimizer.layout import BLOCK, SIDE, Layout, LayoutError

CPU = torch.device("cpu")
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
)
SHAPES = st.lists(SHAPE, min_size=1, max_size=6)


def build(shapes: Sequence[tuple[int, ...]]) -> tuple[Layout, list[torch.Tensor]]:
    """A layout and tensors in its order, whose values are 1, 2, 3, ... over all of them."""
    layout = Layout.build([(f"t{i}", shape) for i, shape in enumerate(shapes)], topk=8)
    numbers = torch.arange(1, layout.numel + 1, dtype=torch.float32).split([p.numel for p in layout.placements])
    return layout, [n.reshape(p.shape) for n, p in zip(numbers, layout.placements, strict=True)]


def by_pieces(slab: Slab, pieces: np.ndarray, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `gather` does, by the definition of a piece."""
    blocks = torch.zeros(slab.count * BLOCK)
    for piece in pieces:
        for row in range(piece["rows"]):
            at = int(piece["block"]) * BLOCK + int(piece["offset"]) + SIDE * row
            start = int(piece["start"]) + int(piece["stride"]) * row
            blocks[at : at + piece["cols"]] += tensors[piece["tensor"]].reshape(-1)[start : start + piece["cols"]]
    return blocks.view(-1, BLOCK)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 20))
def test_slabs_of_any_size_hold_every_value_once(shapes: list[tuple[int, ...]], most: int) -> None:
    layout, tensors = build(shapes)
    whole = gather(Geometry.build(layout, layout.blocks).slabs[0], tensors, CPU)
    geometry = Geometry.build(layout, most)
    slabs = geometry.slabs
    assert np.array_equal(geometry.blocks, np.arange(layout.blocks))
    assert torch.equal(whole, torch.cat([gather(slab, tensors, CPU) for slab in slabs]))
    assert torch.equal(whole, torch.cat([by_pieces(slab, slab.pieces(), tensors) for slab in slabs]))
    assert [s.first for s in slabs] == [0, *np.cumsum([s.count for s in slabs])[:-1]]
    assert max(s.count for s in slabs) <= most
    found = np.sort(whole.numpy().ravel())
    assert np.array_equal(found[found > 0], np.arange(1, layout.numel + 1))

    copies = [torch.zeros_like(t) for t in tensors]
    for slab in slabs:
        blocks = whole[slab.rows]
        for region in slab.regions:
            in_tensor(copies[region.tensor], region).copy_(in_blocks(blocks, region))
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 9), st.data())
def test_two_parts_make_up_the_whole(shapes: list[tuple[int, ...]], most: int, data: st.DataObject) -> None:
    """Each tensor is cut in two along rows or columns; blocks that both touch add up, and come whole by exchange."""
    layout, tensors = build(shapes)
    whole = gather(Geometry.build(layout, layout.blocks).slabs[0], tensors, CPU)
    halves: list[tuple[list[Part], list[torch.Tensor]]] = [([], []), ([], [])]
    for placement, tensor in zip(layout.placements, tensors, strict=True):
        full = Part.whole(placement)
        matrix = tensor.reshape(full.rows[1], full.cols[1])
        by_rows = placement.matrix is not None and data.draw(st.booleans())
        cut = data.draw(st.integers(0, full.rows[1] if by_rows else full.cols[1]))
        for half, span in enumerate(((0, cut), (cut, full.rows[1] if by_rows else full.cols[1]))):
            part = Part(span, full.cols) if by_rows else Part(full.rows, span)
            halves[half][0].append(part)
            halves[half][1].append(matrix[slice(*part.rows), slice(*part.cols)].contiguous())
    found = torch.zeros_like(whole)
    for parts, held in halves:
        geometry = Geometry.build(layout, most, parts)
        for slab in geometry.slabs:
            blocks = gather(slab, held, CPU)
            assert torch.equal(blocks, by_pieces(slab, slab.pieces(), held))
            found[torch.from_numpy(geometry.blocks[slab.rows])] += blocks
    assert torch.equal(found, whole)

    mine = Geometry.build(layout, most, halves[0][0]).blocks
    border = sorted(set(mine) & set(Geometry.build(layout, most, halves[1][0]).blocks))
    exchanged = whole[torch.tensor(border, dtype=torch.long)]
    geometry = Geometry.build(layout, most, halves[0][0], {int(number): row for row, number in enumerate(border)})
    for slab in geometry.slabs:
        complete = whole[torch.from_numpy(geometry.blocks[slab.rows])]
        assert torch.equal(gather(slab, halves[0][1], CPU, exchanged), complete)
        sources = slab.sources(len(tensors))
        assert torch.equal(by_pieces(slab, sources, [*halves[0][1], exchanged]), complete)
        assert np.all(np.diff(sources["block"]) >= 0)


def test_tiles_are_where_the_docstring_says() -> None:
    layout = Layout.build([("m", (70, 130)), ("a", (4097,)), ("x", (3,)), ("y", (4094,)), ("z", (2,))], topk=4)
    matrix = torch.arange(70.0 * 130).reshape(70, 130)
    blocks = gather(Geometry.build(layout, 99).slabs[0], [None, matrix, None, None, None], CPU).view(-1, 64, 64)
    assert blocks[2 + 1, 5, 7] == matrix[5, 64 + 7]
    assert blocks[2 + 3, 5, 7] == matrix[64 + 5, 7]
    assert blocks[2 + 5, 5, 1] == matrix[64 + 5, 128 + 1]
    assert blocks[2 + 5].count_nonzero() == 6 * 2


def test_a_slab_of_no_blocks_is_refused() -> None:
    with pytest.raises(LayoutError, match="a slab of 0 blocks"):
        Geometry.build(Layout.build([("w", (3,))], 8), 0)
