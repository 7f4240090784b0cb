"""A keyed permutation of [0, n) without a table: a Feistel network on the next power of four, walked until inside.

Source: J. Black and P. Rogaway, Ciphers with Arbitrary Finite Domains (CT-RSA 2002), the cycle-walking cipher. The
round function is the finaliser of SplitMix64, which is not a cipher: it spreads samples and keeps no secret.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

ROUNDS = 8
MAX_SIZE = 1 << 62

U64 = npt.NDArray[np.uint64]


def permute(indices: npt.ArrayLike, size: int, key: bytes) -> U64:
    """Return where ``indices`` (any shape, each in [0, size)) go, as uint64 of the same shape; one to one.

    Raises:
        ValueError: ``size`` is not in [1, 2**62], or an index is outside [0, size).
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"a permutation of {size} values: the size must be between 1 and {MAX_SIZE}")
    values = np.array(indices, dtype=np.uint64)
    if values.size and int(values.max()) >= size:
        raise ValueError(f"index {int(values.max())} is outside [0, {size})")
    shape = values.shape
    flat = values.reshape(-1)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    keys = _keys(key)
    # At most three values in four lie outside, so each walk is short: four steps on average, in the worst case.
    outside = np.arange(flat.size)
    while outside.size:
        flat[outside] = _encrypt(flat[outside], half, keys)
        outside = outside[flat[outside] >= np.uint64(size)]
    return flat.reshape(shape)


def _keys(key: bytes) -> U64:
    stream = hashlib.blake2b(key, digest_size=8 * ROUNDS, person=b"psyche permute").digest()
    return np.frombuffer(stream, dtype="<u8").astype(np.uint64)


def _encrypt(values: U64, half: np.uint64, keys: U64) -> U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(z: U64) -> U64:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
