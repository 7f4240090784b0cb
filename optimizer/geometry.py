"""Which blocks of a layout a process works on, and where their values lie in the tensors that it holds.

A process holds one rectangle of each tensor's matrix, its *part*: everything on a site of one device, a range of rows
or columns where the site shards. It works on every block that a part touches. A *slab* is a range of consecutive local
blocks worked on at a time; a *region* is what is regular in it (a grid of equally filled tiles), a *piece* what one
tensor holds of one block.

Legend: a vector is a matrix of one row, cut in tiles of 1x4096; a tile of any other matrix is 64x64.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from optimizer.layout import BLOCK, SIDE, Layout, LayoutError, Placement

PIECE = np.dtype(
    [(name, "<i4") for name in ("tensor", "block", "offset", "rows", "cols", "reserved")]
    + [("start", "<i8"), ("stride", "<i8")]
)
"""A rectangle of a tensor in a block: value (r, c) is value offset + 64 r + c of the block and start + stride r + c of
the tensor. `block` counts from the slab's first. `struct piece` of the compiled kernels."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns (first, stop) of a placement's matrix held here, as one contiguous tensor; may be empty.

    `counted`: this process is the one that counts these values in a sum over all processes (copies are not).
    """

    rows: tuple[int, int]
    cols: tuple[int, int]
    counted: bool = True

    @classmethod
    def whole(cls, placement: Placement) -> "Part":
        height, width = placement.matrix or (1, placement.numel)
        return cls((0, height), (0, width))

    @property
    def numel(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.cols[1] - self.cols[0])


@dataclass(frozen=True, slots=True)
class Region:
    """A regular part of one tensor in one slab: a grid of equally filled tiles.

    Both sides are strided views of one `shape` (tile rows, rows, tile columns, columns): `block_strides` from value
    `at` of the slab on, `tensor_strides` from value `start` of the contiguous tensor on. `tensor` counts placements.
    """

    tensor: int
    shape: tuple[int, int, int, int]
    at: int
    block_strides: tuple[int, int, int, int]
    start: int
    tensor_strides: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Slab:
    """Local blocks first:first+count and the regions of tensors in them.

    `border`: blocks of the slab of which other processes hold a part, mapped to their row in the exchanged gradients.
    """

    first: int
    count: int
    regions: tuple[Region, ...]
    border: Mapping[int, int]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)

    def pieces(self) -> NDArray[np.void]:
        """PIECE records of what the tensors hold, in the order of blocks."""
        return _sorted(np.concatenate([_pieces(region) for region in self.regions] or [np.empty(0, PIECE)]))

    def sources(self, exchanged: int) -> NDArray[np.void]:
        """As `pieces`, but border blocks come whole from tensor number `exchanged`, (rows, 4096)."""
        own = self.pieces()
        if not self.border:
            return own
        whole = np.zeros(len(self.border), PIECE)
        whole["tensor"], whole["rows"], whole["cols"] = exchanged, 1, BLOCK
        whole["block"] = list(self.border)
        whole["start"] = np.array(list(self.border.values()), np.int64) * BLOCK
        return _sorted(np.concatenate([own[~np.isin(own["block"], whole["block"])], whole]))


SLAB_BLOCKS: Final = {"cpu": 256, "cuda": 2048}
"""Of each kind of device. A CPU's caches hold few blocks; a GPU is through with few sooner than the next kernel can be
launched."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The blocks of this process, ascending, as `blocks` (local number -> number in the layout), cut in slabs."""

    layout: Layout
    blocks: NDArray[np.int64]
    slabs: tuple[Slab, ...]

    @classmethod
    def build(
        cls,
        layout: Layout,
        most: int,
        parts: Sequence[Part] | None = None,
        border: Mapping[int, int] | None = None,
    ) -> "Geometry":
        """Slabs of at most `most` blocks. `parts`: one a placement, None: all of everything. `border` maps blocks of
        the layout that other processes hold a part of, to their row in the exchanged gradients.
        """
        if most < 1:
            raise LayoutError(f"a slab of {most} blocks is not possible; it needs at least 1")
        held = parts if parts is not None else [Part.whole(placement) for placement in layout.placements]
        windows, blocks = _windows(layout, held)
        local = {int(np.searchsorted(blocks, number)): row for number, row in (border or {}).items()}
        return cls(layout, blocks, tuple(_slabs(windows, len(blocks), most, local)))

    def rows(self, bodies: Sequence[NDArray[np.uint8]], slab: Slab) -> list[NDArray[np.uint8]]:
        """A slab's rows (N, B) of each body (all blocks, B); without a copy where this process has all blocks."""
        blocks = self.blocks
        return [body[slab.rows] if len(blocks) == len(body) else body[blocks[slab.rows]] for body in bodies]


def touched(placement: Placement, part: Part) -> NDArray[np.int64]:
    """Numbers in the layout of the blocks that `part` has a value in, ascending."""
    if not part.numel:
        return np.empty(0, np.int64)
    grid = _Grid.of(placement, part)
    wide = -(-(placement.matrix or (1, placement.numel))[1] // grid.side[1])
    down, across = (np.arange(*span) for span in (grid.down, grid.across))
    return placement.first + (down[:, None] * wide + across).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Tiles `down` x `across` (first, stop) that a part touches; `cols` are shifted by the offset in a shared block."""

    side: tuple[int, int]
    down: tuple[int, int]
    across: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]

    @classmethod
    def of(cls, placement: Placement, part: Part) -> "_Grid":
        side = (1, BLOCK) if placement.matrix is None else (SIDE, SIDE)
        cols = (part.cols[0] + placement.offset, part.cols[1] + placement.offset)
        down, across = (
            (low // length, -(-high // length)) for (low, high), length in zip((part.rows, cols), side, strict=True)
        )
        return cls(side, down, across, part.rows, cols)

    @property
    def wide(self) -> int:
        return self.across[1] - self.across[0]


@dataclass(frozen=True, slots=True)
class _Window:
    """Local blocks first:stop, in which tensor number `tensor` fills `grid`."""

    tensor: int
    first: int
    stop: int
    grid: _Grid


def _windows(layout: Layout, parts: Sequence[Part]) -> tuple[list[_Window], NDArray[np.int64]]:
    windows: list[_Window] = []
    numbers: list[NDArray[np.int64]] = []
    stop, last = 0, -1
    for tensor, (placement, part) in enumerate(zip(layout.placements, parts, strict=True)):
        mine = touched(placement, part)
        if not len(mine):
            continue
        first = stop - 1 if mine[0] == last else stop  # small vectors share a block
        numbers.append(mine[stop - first :])
        stop, last = first + len(mine), int(mine[-1])
        windows.append(_Window(tensor, first, stop, _Grid.of(placement, part)))
    return windows, np.concatenate([*numbers, np.empty(0, np.int64)])


def _slabs(windows: Sequence[_Window], blocks: int, most: int, border: Mapping[int, int]) -> Iterator[Slab]:
    first, regions = 0, list[Region]()

    def close(stop: int) -> Slab:
        edge = {number - first: row for number, row in border.items() if first <= number < stop}
        return Slab(first, stop - first, tuple(regions), edge)

    for window in windows:
        start = window.first
        while start < window.stop:
            count = 0 if start - first >= most else _fitting(window, start, first + most - start, most)
            if count == 0:
                yield close(start)
                first, regions = start, []
                continue
            regions.extend(_regions(window, start, count, first))
            start += count
    if blocks:
        yield close(blocks)


def _fitting(window: _Window, start: int, room: int, most: int) -> int:
    """How many blocks from `start` on go into a slab with `room` left: whole rows of tiles, or part of one row."""
    left, wide = window.stop - start, window.grid.wide
    into = (start - window.first) % wide
    if window.grid.side[0] == 1:
        return min(room, left)
    if into == 0 and room >= wide:
        return min(room // wide * wide, left)
    if into == 0 and wide <= most:
        return 0  # the row fits into a fresh slab
    return min(room, wide - into)


def _regions(window: _Window, start: int, count: int, slab: int) -> Iterator[Region]:
    grid = window.grid
    high, long = grid.side
    stride = grid.cols[1] - grid.cols[0]
    top, left = divmod(start - window.first, grid.wide)
    top, left = top + grid.down[0], left + grid.across[0]
    down, across = (count // grid.wide, grid.wide) if count >= grid.wide else (1, count)
    for tile_row, tile_rows, row, rows in _spans(top, down, high, *grid.rows):
        for tile_col, tile_cols, col, cols in _spans(left, across, long, *grid.cols):
            block = start - slab + (tile_row - top) * across + tile_col - left
            held = (tile_row * high + row - grid.rows[0]) * stride + tile_col * long + col - grid.cols[0]
            yield Region(
                window.tensor,
                (tile_rows, rows, tile_cols, cols),
                block * BLOCK + row * SIDE + col,
                (across * BLOCK, SIDE, BLOCK, 1),
                held,
                (high * stride, stride, long, 1),
            )


def _spans(first: int, tiles: int, side: int, low: int, high: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles first:first+tiles of a side, as far as values low:high fill them: (tile, tiles, first value, values)."""
    low, high = max(low, first * side), min(high, (first + tiles) * side)
    tile = low // side
    if low % side and low < high:
        yield tile, 1, low % side, min(high, (tile + 1) * side) - low
        tile += 1
    if (full := high // side - tile) > 0:
        yield tile, full, 0, side
        tile += full
    if tile * side < high:
        yield tile, 1, 0, high - tile * side


def _pieces(region: Region) -> NDArray[np.void]:
    tile_rows, rows, tile_cols, cols = region.shape
    i, j = (axis.reshape(-1) for axis in np.indices((tile_rows, tile_cols), dtype=np.int64))
    made = np.zeros(len(i), PIECE)
    block, offset = np.divmod(region.at + i * region.block_strides[0] + j * region.block_strides[2], BLOCK)
    made["tensor"], made["block"], made["offset"] = region.tensor, block, offset
    made["rows"], made["cols"], made["stride"] = rows, cols, region.tensor_strides[1]
    made["start"] = region.start + i * region.tensor_strides[0] + j * region.tensor_strides[2]
    return made


def _sorted(pieces: NDArray[np.void]) -> NDArray[np.void]:
    return pieces[np.argsort(pieces["block"], kind="stable")]
