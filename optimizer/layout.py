"""How a model's tensors are cut into blocks of 4,096 values: one canonical order that every member derives alone.

Legend: a *block* is 64x64 values. A matrix (two or more dimensions; the trailing ones are flattened) is cut in 64x64
tiles, row by row of tiles, with zeros beyond its edges. A vector of 4,096 values or more is cut in runs of 4,096, the
last one filled up with zeros. Smaller vectors share blocks: in order, none straddling two. Tensors come in the order of
their names (by code point); the shared blocks are last. A *slab* is a range of consecutive blocks worked on at a time.

numpy and torch are not needed here.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

SIDE = 64
BLOCK = SIDE * SIDE
HEADER_BYTES = 96
MAX_BLOCKS = 1 << 40


class LayoutError(ValueError):
    """Shapes or a topk that no layout can be built from."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor lies. `matrix` is (rows, columns) of a tiled tensor, None of a vector.

    `offset` is the first value inside block `first`: other than 0 only in a shared block.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    blocks: int
    matrix: tuple[int, int] | None
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Region:
    """A regular part of one tensor in one slab: a grid of equally filled tiles, or one run of a vector.

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
    """Blocks first:first+count of the layout, and the regions of tensors in them."""

    first: int
    count: int
    regions: tuple[Region, ...]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


@dataclass(frozen=True, slots=True)
class BlockCode:
    """Sizes in bits of one block's code: low bits and bitmap of the Elias-Fano code of the indices, then signs."""

    topk: int
    low: int = field(init=False)
    bitmap: int = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= BLOCK:
            raise LayoutError(f"topk is {self.topk}; it must be between 1 and {BLOCK}, the values in a block")
        low = 12 - (self.topk - 1).bit_length()
        bitmap = self.topk + (BLOCK >> low)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "bitmap", bitmap)
        object.__setattr__(self, "bytes", (self.topk * low + bitmap + self.topk + 7) // 8)


@dataclass(frozen=True, slots=True)
class Layout:
    """Blocks of a model, from names and shapes alone; the same on every member whatever its hardware.

    `digest` (32 bytes) identifies it, `blocks` counts blocks, `topk` coefficients are sent per block, and every update
    has exactly `update_bytes` bytes.
    """

    placements: tuple[Placement, ...]
    blocks: int
    topk: int
    code: BlockCode
    digest: bytes
    update_bytes: int

    @classmethod
    def build(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], topk: int) -> "Layout":
        """Lay out tensors given as (name, shape), in any order. Raises LayoutError with the tensor at fault."""
        code = BlockCode(topk)
        ordered = sorted((name, tuple(int(d) for d in shape)) for name, shape in shapes)
        if not ordered:
            raise LayoutError("there is no tensor to lay out; pass the parameters that are trained")
        for (name, shape), (following, _) in zip(ordered, [*ordered[1:], ("", ())], strict=True):
            if name == following:
                raise LayoutError(f"two tensors are called {name!r}; give every tensor its own name")
            if any(d <= 0 for d in shape):
                raise LayoutError(f"{name!r} has shape {shape}; every dimension must be positive")
        placements = tuple(_place(ordered))
        blocks = max(p.first + p.blocks for p in placements)
        if blocks > MAX_BLOCKS:
            raise LayoutError(f"{blocks} blocks are more than {MAX_BLOCKS}; the shapes cannot be those of a model")
        return cls(placements, blocks, topk, code, _digest(ordered, topk), HEADER_BYTES + blocks * code.bytes)

    @property
    def numel(self) -> int:
        """Values in all tensors, without the zeros of the edges."""
        return sum(p.numel for p in self.placements)

    def slabs(self, most: int) -> tuple[Slab, ...]:
        """All blocks in order, in slabs of at most `most` blocks: what is done slab by slab needs bounded memory."""
        if most < 1:
            raise LayoutError(f"a slab of {most} blocks is not possible; it needs at least 1")
        slabs: list[Slab] = []
        first, regions = 0, list[Region]()
        for tensor, placement in enumerate(self.placements):
            start, stop = placement.first, placement.first + placement.blocks
            while start < stop:
                if start - first >= most:
                    slabs.append(Slab(first, start - first, tuple(regions)))
                    first, regions = start, []
                count = _fitting(placement, start, first + most - start, most)
                if count == 0:
                    slabs.append(Slab(first, start - first, tuple(regions)))
                    first, regions = start, []
                    continue
                regions.extend(_regions(placement, tensor, start, count, first))
                start += count
        slabs.append(Slab(first, self.blocks - first, tuple(regions)))
        return tuple(slabs)


def _place(ordered: Sequence[tuple[str, tuple[int, ...]]]) -> Iterator[Placement]:
    first, small = 0, []
    for name, shape in ordered:
        numel = prod(shape)
        if len(shape) >= 2:
            matrix = (shape[0], numel // shape[0])
            blocks = -(-matrix[0] // SIDE) * -(-matrix[1] // SIDE)
        elif numel >= BLOCK:
            matrix, blocks = None, -(-numel // BLOCK)
        else:
            small.append((name, shape, numel))
            continue
        yield Placement(name, shape, first, blocks, matrix)
        first += blocks
    used = 0
    for name, shape, numel in small:
        if used + numel > BLOCK:
            first, used = first + 1, 0
        yield Placement(name, shape, first, 1, None, used)
        used += numel


def _fitting(placement: Placement, start: int, room: int, most: int) -> int:
    """How many blocks from `start` on go into a slab with `room` left: whole rows of tiles, or part of one row."""
    left = placement.first + placement.blocks - start
    if placement.matrix is None:
        return min(room, left)
    wide = -(-placement.matrix[1] // SIDE)
    into = (start - placement.first) % wide
    if into == 0 and room >= wide:
        return min(room // wide * wide, left)
    if into == 0 and wide <= most:
        return 0  # the row fits into a fresh slab
    return min(room, wide - into)


def _regions(placement: Placement, tensor: int, start: int, count: int, slab: int) -> Iterator[Region]:
    at = (start - slab) * BLOCK + placement.offset
    skipped = start - placement.first
    if placement.matrix is None:
        begin = skipped * BLOCK
        length = min(count * BLOCK, placement.numel - begin)
        yield Region(tensor, (1, 1, 1, length), at, (0, 0, 0, 1), begin, (0, 0, 0, 1))
        return
    height, width = placement.matrix
    wide = -(-width // SIDE)
    top, left = divmod(skipped, wide)
    down, across = (count // wide, wide) if count >= wide else (1, count)
    for tile_row, tile_rows, rows in _spans(top, down, height):
        for tile_col, tile_cols, cols in _spans(left, across, width):
            yield Region(
                tensor,
                (tile_rows, rows, tile_cols, cols),
                at + ((tile_row - top) * across + tile_col - left) * BLOCK,
                (across * BLOCK, SIDE, BLOCK, 1),
                tile_row * SIDE * width + tile_col * SIDE,
                (SIDE * width, width, SIDE, 1),
            )


def _spans(first: int, tiles: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Tiles first:first+tiles along a side of `length` values as (first tile, tiles, values in each)."""
    full = min(tiles, length // SIDE - first)
    if full:
        yield first, full, SIDE
    if full < tiles:
        yield first + full, 1, length % SIDE


def _digest(ordered: Sequence[tuple[str, tuple[int, ...]]], topk: int) -> bytes:
    """SHA-256 of: "psyche layout 1", block side u32, topk u32, tensors u64, then per tensor in order its name (u32
    length, UTF-8), dimensions (u32 count, u64 each). All little-endian."""
    digest = hashlib.sha256(b"psyche layout 1" + struct.pack("<IIQ", SIDE, topk, len(ordered)))
    for name, shape in ordered:
        text = name.encode()
        digest.update(struct.pack(f"<I{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape))
    return digest.digest()
