"""The Walsh-Hadamard transform of blocks: by butterflies in fp32, and exactly on integer votes.

Legend: N blocks; C = 4096 values of a block, which is a 64x64 tile row by row; H the Sylvester matrix of +1 and -1.
The natural-order transform of the 4,096 values is H X H of the tile X: coefficient 64 a + b counts a sign changes along
its columns, b along its rows. Applied twice it multiplies by 4,096; divided by 64 it is orthonormal.

Butterflies take their strides in ascending order, so that every device and every slab size makes the same roundings.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from optimizer.layout import BLOCK, SIDE

OPERANDS = {"fp32": 1 << 24, "tf32": 1 << 11, "bf16": 1 << 8, "int8": 127, "int64": 1 << 62}
"""Paths of the exact inverse: the largest integer that both operands of a product may hold. Sums stay below 2^24 in the
floating-point units (which add in fp32), below 2^31 for int8, below 2^63 for int64."""
_SUMS = {"int8": (1 << 31) - 1, "int64": (1 << 63) - 1}


def largest_votes(path: str) -> int:
    """The largest magnitude of a vote that `path` inverts exactly.

    The second product has sums of 64 votes as operands, and its own sums are of 4,096 votes.
    """
    return min(OPERANDS[path] // SIDE, _SUMS.get(path, 1 << 24) // BLOCK)


MOST_VOTES = largest_votes("fp32")
"""A sum of votes up to here is an exact fp32 number after the inverse."""


@cache
def hadamard(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 64x64 Sylvester matrix."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < SIDE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix.to(device, dtype)


def butterflies(values_NC: Tensor) -> Tensor:
    """H X H of contiguous blocks (N, 4096) of any signed type, as a new tensor; not divided by 64.

    Along the rows first, through a transposed copy, so that the innermost loop is always 64 values long.
    """
    columns = values_NC.view(-1, SIDE, SIDE).mT.contiguous()
    rows = _along_first(columns).mT.contiguous()
    return _along_first(rows).view(-1, BLOCK)


def _along_first(tiles: Tensor) -> Tensor:
    """Six stages along dimension 1 of (N, 64, 64); overwrites its argument."""
    here, there = tiles, torch.empty_like(tiles)
    stride = 1
    while stride < SIDE:
        pairs = here.view(-1, SIDE // (2 * stride), 2, stride, SIDE)
        made = there.view(-1, SIDE // (2 * stride), 2, stride, SIDE)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=made[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=made[:, :, 1])
        here, there = there, here
        stride *= 2
    return here


def invert_votes(votes_NC: Tensor, bound: int, path: str | None = None) -> Tensor:
    """H V H of integer votes (N, 4096) held in fp32, as exact integers in fp32 (N, 4096).

    `bound` is the largest magnitude a vote can have; `path` a key of OPERANDS, by default what
    `choose_path` says. Raises ValueError if the path does not allow
    it, or if the result would not fit fp32.
    """
    if not 0 < bound <= MOST_VOTES:
        raise ValueError(f"votes up to {bound} cannot be inverted exactly; at most {MOST_VOTES} members may vote")
    chosen = path or choose_path(bound)
    if bound > largest_votes(chosen):
        raise ValueError(f"votes up to {bound} are not exact by {chosen}; it allows {largest_votes(chosen)}")
    if chosen == "int64":
        return butterflies(votes_NC.long()).float()
    tiles = votes_NC.view(-1, SIDE, SIDE)
    with torch.autocast(votes_NC.device.type, enabled=False):
        if chosen == "int8":
            return _both_sides(tiles, _int8_product).view(-1, BLOCK).float()
        return _both_sides(tiles, _product).view(-1, BLOCK)


def choose_path(bound: int) -> str:
    """A matrix unit where `bound` is exact at whatever precision PyTorch is set to, integers beyond."""
    return "bf16" if bound <= largest_votes("bf16") else "int64"


def _both_sides(tiles: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    return product(product(tiles).mT).mT.contiguous()


def _product(tiles: Tensor) -> Tensor:
    # One product of (64 N, 64) by (64, 64) is several times faster than N products of 64x64.
    return (tiles.reshape(-1, SIDE) @ hadamard(tiles.device)).view(-1, SIDE, SIDE)


def _int8_product(tiles: Tensor) -> Tensor:
    H = hadamard(tiles.device, torch.int8)
    return torch._int_mm(tiles.reshape(-1, SIDE).to(torch.int8), H).view(-1, SIDE, SIDE)
