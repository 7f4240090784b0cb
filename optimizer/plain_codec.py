"""The code of blocks in numpy: the definition that the compiled kernels are tested against. The format is in `codec`.

Shapes: N blocks, K coefficients per block (topk), B bytes per block.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import MalformedUpdate
from optimizer.layout import BLOCK, BlockCode

Indices = NDArray[np.uint16]
Signs = NDArray[np.bool_]
Numbers = Sequence[int] | NDArray[np.int64]


def encode_blocks(indices: Indices, signs: Signs, code: BlockCode) -> NDArray[np.uint8]:
    """Code of N blocks (N, B) uint8. Raises ValueError unless indices are below 4096 and strictly ascending."""
    if indices.size and (indices.max() >= BLOCK or not (indices[:, 1:] > indices[:, :-1]).all()):
        raise ValueError("indices of a block must be strictly ascending and below 4096")
    blocks, topk, low = len(indices), code.topk, code.low
    bits = np.zeros((blocks, code.bytes * 8), np.uint8)
    spread = np.unpackbits(indices.astype("<u2").view(np.uint8).reshape(blocks, topk, 2), axis=2, bitorder="little")
    bits[:, : topk * low] = spread[:, :, :low].reshape(blocks, topk * low)
    where = (indices >> low).astype(np.intp) + (np.arange(topk) + topk * low)
    np.put_along_axis(bits, where, np.uint8(1), axis=1)
    end = topk * low + code.bitmap
    bits[:, end : end + topk] = signs
    return np.packbits(bits, axis=1, bitorder="little")


def decode_blocks(body: NDArray[np.uint8], code: BlockCode, numbers: Numbers) -> tuple[Indices, Signs]:
    """Indices and signs (N, K) of N blocks, called `numbers` in messages.

    Raises MalformedUpdate, naming the first block at fault, for anything `encode_blocks` would not have made.
    """
    blocks, topk, low = len(body), code.topk, code.low
    bits = np.unpackbits(body, axis=1, bitorder="little")
    end = topk * low + code.bitmap
    bitmap, signs, rest = bits[:, topk * low : end], bits[:, end : end + topk], bits[:, end + topk :]
    _require(bitmap.sum(axis=1) == topk, numbers, f"its bitmap does not have {topk} bits set")
    _require((rest == 0).all(axis=1), numbers, "the bits after the signs are not zero")
    high = np.flatnonzero(bitmap).reshape(blocks, topk)
    high -= np.arange(blocks)[:, None] * code.bitmap
    high -= np.arange(topk)
    wide = np.zeros((blocks, topk, 16), np.uint8)
    wide[:, :, :low] = bits[:, : topk * low].reshape(blocks, topk, low)
    lows = np.packbits(wide, axis=2, bitorder="little").view("<u2")[:, :, 0]
    indices = (high << low) | lows
    _require((indices < BLOCK).all(axis=1), numbers, "an index is beyond 4095")
    _require((indices[:, 1:] > indices[:, :-1]).all(axis=1), numbers, "its indices are not strictly ascending")
    return indices.astype(np.uint16), cast(Signs, signs.astype(np.bool_))


def _require(good: NDArray[np.bool_], numbers: Numbers, reason: str) -> None:
    if not good.all():
        raise MalformedUpdate(f"block {int(numbers[int(np.argmin(good))])}: {reason}")
