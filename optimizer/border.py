"""Which blocks several processes hold a part of, and where the values of these lie in what one of them holds.

Nothing is sent here; `sharding` does that. Legend: *edges* are the numbers in the layout, ascending, of the blocks that
some process touches but does not hold all of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from optimizer.geometry import Geometry, Part, touched
from optimizer.layout import BLOCK, SIDE, Layout, LayoutError, Placement

NOTHING = Part((0, 0), (0, 0), counted=False)


def require_cover(placement: Placement, parts: Sequence[Part]) -> None:
    """Raise LayoutError unless the parts of all processes form a grid, all cells of which are held."""
    whole = Part.whole(placement)
    cells = {(part.rows, part.cols) for part in parts if part.numel}
    down, across = sorted({rows for rows, _ in cells}), sorted({cols for _, cols in cells})
    if not (_tiles(down, whole.rows) and _tiles(across, whole.cols) and len(cells) == len(down) * len(across)):
        raise LayoutError(
            f"the processes of the group do not hold all of {placement.name!r}, or shards overlap; "
            f"pass the group of all the processes that share the model"
        )


def _tiles(spans: Sequence[tuple[int, int]], whole: tuple[int, int]) -> bool:
    ends = [whole[0], *(stop for _, stop in spans)]
    return [first for first, _ in spans] == ends[:-1] and ends[-1] == whole[1]


def counted(held: Sequence[Sequence[Part]], rank: int) -> list[Part]:
    """The parts of one rank; those that a lower rank holds too do not count."""
    lower = [{(part.rows, part.cols) for part in parts} for parts in zip(*held[:rank], strict=True)]
    return [
        replace(part, counted=part.numel > 0 and (not rank or (part.rows, part.cols) not in lower[tensor]))
        for tensor, part in enumerate(held[rank])
    ]


def filling(layout: Layout, parts: Sequence[Part]) -> NDArray[np.int32]:
    """How many values of each block of the layout the parts hold."""
    values = np.zeros(layout.blocks, np.int32)
    for placement, part in zip(layout.placements, parts, strict=True):
        side = (SIDE, SIDE) if placement.matrix else (1, BLOCK)
        cols = (part.cols[0] + placement.offset, part.cols[1] + placement.offset)
        down, across = (_overlaps(span, length) for span, length in zip((part.rows, cols), side, strict=True))
        if part.numel:
            values[touched(placement, part)] += np.outer(down, across).reshape(-1)
    return values


def _overlaps(span: tuple[int, int], side: int) -> NDArray[np.int32]:
    """How many values of a span are in each tile of a side that it touches."""
    starts = np.arange(span[0] // side * side, span[1], side)
    return (np.minimum(starts + side, span[1]) - np.maximum(starts, span[0])).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Run:
    """Equal pieces (rows x cols) of one tensor in edges first, first + step, ...; strides in values of the tensor."""

    tensor: int
    first: int
    step: int
    shape: tuple[int, int, int]
    offset: int
    start: int
    strides: tuple[int, int, int]

    def copy(self, tensor: Tensor | None, edges_NC: Tensor, first: int) -> None:
        """Copy what belongs there to `edges_NC`, edges from number `first` on."""
        low = max(0, -((self.first - first) // self.step))
        high = min(self.shape[0], -((self.first - first - len(edges_NC)) // self.step))
        if tensor is None or low >= high:
            return
        shape, place = (high - low, *self.shape[1:]), self.first + low * self.step - first
        source = tensor.storage_offset() + self.start + low * self.strides[0]
        target = edges_NC.as_strided(shape, (self.step * BLOCK, SIDE, 1), place * BLOCK + self.offset)
        target.copy_(tensor.as_strided(shape, self.strides, source))


def runs(layout: Layout, parts: Sequence[Part], edges: NDArray[np.int64]) -> Iterator[Run]:
    """The counted values of the parts that are in edges.

    Of a region, all tiles are edges or none is, since shards form a grid; and a tile that is one is not full, so that
    a region of them is a single row or column of tiles, evenly spaced among the edges.
    """
    geometry = Geometry.build(layout, layout.blocks, [part if part.counted else NOTHING for part in parts])
    for region in (region for slab in geometry.slabs for region in slab.regions):
        axis = 2 if region.shape[0] == 1 else 0
        block, offset = divmod(region.at, BLOCK)
        blocks = geometry.blocks[block :: region.block_strides[axis] // BLOCK][: region.shape[axis]]
        places = np.searchsorted(edges, blocks)
        if places[0] == len(edges) or edges[places[0]] != blocks[0]:
            continue
        yield Run(
            region.tensor,
            int(places[0]),
            int(places[1] - places[0]) if len(places) > 1 else 1,
            (region.shape[axis], region.shape[1], region.shape[3]),
            offset,
            region.start,
            (region.tensor_strides[axis], region.tensor_strides[1], 1),
        )
