"""A 64-bit keyed checksum of fp32 weights: exact, and the same in whatever order and grouping it is summed.

F = sum over blocks b and values j of K_b * R_j * bits(b, j), modulo 2^64. K and R are odd numbers drawn by SplitMix64
(Steele, Lea, Flood 2014) from a key; bits are the 32 bits of a value, 0 where a block is padded. Odd factors are
invertible, so one changed value always changes F. It finds divergence; it is no defence against forgery.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.blocks import gather
from optimizer.layout import BLOCK, Layout

_MASK = (1 << 64) - 1


def fingerprint(weights: Sequence[Tensor], layout: Layout, device: torch.device, slab_blocks: int) -> int:
    """Checksum of fp32 `weights` in the order of the layout's placements, keyed with the layout's digest."""
    key = int.from_bytes(layout.digest[:8], "little")
    within_C = _coefficients(key, 0, BLOCK).to(device)
    total = 0
    for slab in layout.slabs(slab_blocks):
        bits_NC = gather(slab, weights, device).view(torch.int32).view(-1, BLOCK).long() & 0xFFFFFFFF
        of_blocks_N = _coefficients(key, BLOCK + slab.first, slab.count).to(device)
        # int64 sums and products wrap, which is arithmetic modulo 2^64.
        total += int(((bits_NC * within_C).sum(dim=1) * of_blocks_N).sum())
    return total & _MASK


def _coefficients(key: int, start: int, count: int) -> Tensor:
    return torch.from_numpy(splitmix64(key, start, count).view(np.int64)) | 1


def splitmix64(seed: int, start: int, count: int) -> NDArray[np.uint64]:
    """Outputs start:start+count of the SplitMix64 generator with this seed."""
    steps = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    x = np.uint64(seed & _MASK) + steps * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
