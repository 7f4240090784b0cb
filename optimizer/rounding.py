"""Rounding to bf16 by chance, with chances that every process draws alike: no state, only a counter and a key.

bf16 has 8 bits of precision, so that a step of 1e-5 is lost on most weights if the nearest number is taken. Here the
larger of the two neighbours is taken with the probability that makes the mean exact. The bits are those of Philox-4x32
with 10 rounds (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") of the key and of where
a weight is in the layout: the same on every device, for any shards, slabs and threads.

Legend: N blocks, C = 4096 weights of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.layout import BLOCK

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_EACH = 8
"""Weights that four words make draws of 16 bits for."""
DRAWS = 1 << 16
"""A draw is one of so many numbers, from 0."""

STEP, LOOKAHEAD = 0, 1
"""Streams: weights that stay, and weights that only a gradient is taken at."""


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four words of a counter to four random words. int64 tensors of 32-bit values; key: 64 bits."""
    a, b, c, d = counter
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        # Products wrap modulo 2^64, and the bits above the 32nd come out right of an arithmetic shift, too.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (second >> 32 & _WORD) ^ b ^ low, second & _WORD
        c, d = (first >> 32 & _WORD) ^ d ^ high, first & _WORD
        low, high = low + _INCREMENTS[0] & _WORD, high + _INCREMENTS[1] & _WORD
    return a, b, c, d


@dataclass(frozen=True, slots=True)
class Chance:
    """Draws of one round. `key`: 64 bits that all members share; `stream`: STEP or LOOKAHEAD."""

    key: int
    round: int
    stream: int

    def draws(self, blocks: NDArray[np.int64], device: torch.device) -> Tensor:
        """(N, 4096) int32, each in 0..65535, for the blocks with these numbers in the layout.

        Weight i = 4096 * block + place has half i % 2 (0: the lower one) of word i // 2 % 4 of the counter
        (i // 8 modulo 2^32, i // 8 / 2^32, round, stream).
        """
        firsts_N1 = torch.from_numpy(blocks).to(device)[:, None] * (BLOCK // _EACH)
        places_NP = firsts_N1 + torch.arange(BLOCK // _EACH, device=device)
        round_NP = torch.full_like(places_NP, self.round & _WORD)
        stream_NP = torch.full_like(places_NP, self.stream)
        words = philox((places_NP & _WORD, places_NP >> 32, round_NP, stream_NP), self.key)
        halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        return torch.stack(halves, dim=-1).view(len(blocks), BLOCK).int()


def round_by_chance(values: Tensor, draws: Tensor) -> Tensor:
    """fp32 `values` to bf16: up in magnitude if the 16 bits that bf16 has no room for, and `draws`, reach 2^16.

    What bf16 can hold stays as it is.
    """
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + draws) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()
