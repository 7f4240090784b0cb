"""How a model's tensors are cut into blocks of 4,096 values: one canonical order that every member derives alone.

Legend: a *block* is 64x64 values. A matrix (two or more dimensions; the trailing ones are flattened) is cut in 64x64
tiles, row by row of tiles, with zeros beyond its edges. A vector of 4,096 values or more is cut in runs of 4,096, the
last one filled up with zeros. Smaller vectors share blocks: in order, none straddling two. Tensors come in the order of
their names (by code point); the shared blocks are last. Which of them a process works on is in `geometry`.

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
class BlockCode:
    """Sizes in bits of one block's code: low bits and bitmap of the Elias-Fano code of the indices, then signs."""

    topk: int
    low: int = field(init=False)
    bitmap: int = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if type(self.topk) is not int or not 1 <= self.topk <= BLOCK:
            raise LayoutError(f"topk is {self.topk!r}; it must be an int between 1 and {BLOCK}, the values in a block")
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
    def build(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], topk: int, only_bf16: bool = False) -> "Layout":
        """Lay out tensors given as (name, shape), in any order. Raises LayoutError with the tensor at fault.

        ``only_bf16``: steps are rounded to bf16. It changes the digest, so that members who keep their weights
        otherwise refuse each other's updates, and nothing else.
        """
        code = BlockCode(topk)
        ordered = sorted((name, tuple(int(d) for d in shape)) for name, shape in shapes)
        if not ordered:
            raise LayoutError("there is no tensor to lay out; pass the parameters that are trained")
        for (name, shape), (following, _) in zip(ordered, [*ordered[1:], ("", ())], strict=True):
            if name == following:
                raise LayoutError(f"two tensors are called {name!r}; give every tensor its own name")
            if any(d <= 0 for d in shape):
                raise LayoutError(f"{name!r} has shape {shape}; every dimension must be positive (leave it out)")
        placements = tuple(_place(ordered))
        blocks = max(p.first + p.blocks for p in placements)
        if blocks > MAX_BLOCKS:
            raise LayoutError(f"{blocks} blocks are more than {MAX_BLOCKS}; the shapes cannot be those of a model")
        return cls(
            placements, blocks, topk, code, _digest(ordered, topk, only_bf16), HEADER_BYTES + blocks * code.bytes
        )

    @property
    def numel(self) -> int:
        """Values in all tensors, without the zeros of the edges."""
        return sum(p.numel for p in self.placements)


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


def _digest(ordered: Sequence[tuple[str, tuple[int, ...]]], topk: int, only_bf16: bool) -> bytes:
    """SHA-256 of: "psyche layout 2" (and " bf16" for weights in bf16 only), block side u32, topk u32, tensors u64, then
    per tensor in order its name (u32 length, UTF-8), dimensions (u32 count, u64 each). All little-endian."""
    kind = b"psyche layout 2" + b" bf16" * only_bf16
    digest = hashlib.sha256(kind + struct.pack("<IIQ", SIDE, topk, len(ordered)))
    for name, shape in ordered:
        text = name.encode()
        digest.update(struct.pack(f"<I{len(text)}sI{len(shape)}Q", len(text), text, len(shape), *shape))
    return digest.digest()
