"""A 64-bit keyed checksum of fp32 weights: exact, and the same in whatever order and grouping it is summed.

F = sum over blocks b and values j of K_b * R_j * bits(b, j), modulo 2^64. K and R are odd numbers drawn by SplitMix64
(Steele, Lea, Flood 2014) from the layout's digest; bits are the 32 bits of a value, 0 where a block is padded. Odd
factors are invertible, so one changed value always changes F. It finds divergence; it is no defence against forgery.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.blocks import gather
from optimizer.geometry import Geometry, Slab
from optimizer.layout import BLOCK, Layout

_MASK = (1 << 64) - 1


def sum_of_slab(slab: Slab, weights: Sequence[Tensor | None], geometry: Geometry, device: torch.device) -> int:
    """The part of F that the blocks of `slab` make up, from fp32 `weights` in the order of the placements."""
    within_C = torch.from_numpy(within_block(geometry.layout).view(np.int64)).to(device)
    of_blocks_N = torch.from_numpy(of_blocks(geometry.layout, geometry.blocks[slab.rows]).view(np.int64)).to(device)
    bits_NC = gather(slab, weights, device).view(torch.int32).long() & 0xFFFFFFFF
    # int64 sums and products wrap, which is arithmetic modulo 2^64.
    return int(((bits_NC * within_C).sum(dim=1) * of_blocks_N).sum()) & _MASK


def within_block(layout: Layout) -> NDArray[np.uint64]:
    """R, (4096,): the first outputs of the generator."""
    return _odd(layout, np.arange(BLOCK))


def of_blocks(layout: Layout, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """K of the blocks with these numbers in the layout: the outputs after those of R."""
    return _odd(layout, numbers + BLOCK)


def _odd(layout: Layout, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    return splitmix64(int.from_bytes(layout.digest[:8], "little"), places) | np.uint64(1)


def splitmix64(seed: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Outputs number `places` (from 0) of the SplitMix64 generator with this seed."""
    x = np.uint64(seed & _MASK) + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
