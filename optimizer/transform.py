"""The Walsh-Hadamard transform of 64x64 blocks, in floating point and exactly on integer votes.

Legend: N blocks; X a block of weights or gradients (64, 64); C its coefficients; H the Sylvester matrix of +1 and -1.
C = H X^T H / 64. The transposition costs nothing (the second product needs it anyway) and makes the transform its own
inverse: X = H C^T H / 64. Coefficient (a, b) of a block has index 64 a + b; a counts sign changes along a row of X.
"""

from functools import cache

import torch
from torch import Tensor

from optimizer.layout import SIDE

# Integers up to here are exact in bfloat16, the narrowest format that a matrix unit may silently use for fp32 operands.
NARROW = 256
# Up to this bound on votes two such integers hold any sum over a row of 64; fp32 itself would be exact up to 4,095.
MOST_VOTES = NARROW * NARROW // SIDE


@cache
def hadamard(device: torch.device, scale: float = 1.0) -> Tensor:
    """The 64x64 Sylvester matrix times `scale`, fp32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < SIDE:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix * scale).to(device)


def transform(blocks_NXY: Tensor) -> Tensor:
    """Orthonormal transform of fp32 blocks (N, 64, 64): coefficients (N, 64, 64), and back."""
    with torch.autocast(blocks_NXY.device.type, enabled=False):
        return _both_sides(blocks_NXY, hadamard(blocks_NXY.device, 0.125))


def invert_votes(votes_NC: Tensor, bound: int) -> Tensor:
    """H V^T H of integer votes (N, 4096) held in fp32, as exact integers in fp32 (N, 64, 64).

    `bound` is the largest magnitude a vote can have. Exact on every device, in every order of summation and under every
    precision setting of matrix products (TF32, bf16): operands stay within `NARROW`, sums below 2^24. Raises ValueError
    if `bound` does not allow it.
    """
    if not 0 < bound <= MOST_VOTES:
        raise ValueError(f"votes up to {bound} cannot be inverted exactly; at most {MOST_VOTES} members may vote")
    H = hadamard(votes_NC.device)
    with torch.autocast(votes_NC.device.type, enabled=False):
        return _exact_product(_exact_product(votes_NC.view(-1, SIDE, SIDE), H, bound).mT, H, bound * SIDE)


def _both_sides(blocks: Tensor, H: Tensor) -> Tensor:
    return _product(_product(blocks, H).mT, H)


def _product(blocks: Tensor, H: Tensor) -> Tensor:
    # One product of (64 N, 64) by (64, 64) is several times faster than N products of 64x64.
    return (blocks.reshape(-1, SIDE) @ H).view(-1, SIDE, SIDE)


def _exact_product(blocks: Tensor, H: Tensor, bound: int) -> Tensor:
    if bound <= NARROW:
        return _product(blocks, H)
    # x = 256 high + low, both within NARROW as bound <= NARROW^2, and the product is linear.
    high = torch.round(blocks / NARROW)
    low = blocks - high * NARROW
    return _product(high, H) * NARROW + _product(low, H)
