"""The order in which the sequences of a pass are trained: shuffled, and balanced by cost wherever it is cut.

The sequences of a prepared folder lie in order of attention cost. Their range is cut into strata of equal size;
position after position takes a sequence of the next stratum, in one fixed cycle, and each stratum is shuffled by a
keyed permutation of its own. So as many consecutive positions as there are strata hold one sequence of each, wherever
they begin: a member's slice costs per position what any other's does, whatever the shares, the size of a round, and how
many positions were queued again before it. Nothing is stored: a position is computed from (key, number of sequences).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psyche_node.data.permutation import MAX_SIZE, permute

U64 = npt.NDArray[np.uint64]

# Of the orders of 0..7, the one whose runs (cyclic, of any length) stay nearest to the mean, in the sum of squares.
_COARSE = (0, 6, 2, 4, 3, 5, 1, 7)
_FINE_BITS = 3


def _cycle(fine_bits: int) -> tuple[int, ...]:
    """The strata in the order of their turns: 8 * 2**fine_bits, so that any 8 in a row hold one of each coarse eighth.

    An eighth's own parts take turns by bit reversal, every second eighth's from the top: a run has as many dear parts
    of some eighths as cheap ones of others.
    """
    parts = 1 << fine_bits
    turns = []
    for turn in range(parts):
        part = int(f"{turn:0{fine_bits}b}"[::-1], 2) if fine_bits else 0
        turns += [eighth * parts + (parts - 1 - part if at % 2 else part) for at, eighth in enumerate(_COARSE)]
    return tuple(turns)


_CYCLES = (*(_cycle(bits) for bits in range(_FINE_BITS, -1, -1)), (0,))


def balanced_order(positions: npt.ArrayLike, size: int, key: bytes) -> U64:
    """Return which sequence (of ``size``, in order of cost) each position is; one to one.

    ``positions`` (n,) are in [0, size); the result is (n,), uint64. Memory and time do not depend on ``size``.

    Raises:
        ValueError: ``size`` is not in [1, 2**62], or a position is outside [0, size).
    """
    flat = np.array(positions, dtype=np.uint64).reshape(-1)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"an order of {size} sequences: there must be between 1 and {MAX_SIZE}")
    if flat.size and int(flat.max()) >= size:
        raise ValueError(f"position {int(flat.max())} is outside [0, {size})")
    return _ordered(flat, size, key)


def _ordered(positions: U64, size: int, key: bytes) -> U64:
    cycle = next(cycle for cycle in _CYCLES if len(cycle) <= size)
    rounds, left = divmod(size, len(cycle))
    # What does not fill a last cycle: `left` of the strata have one sequence more than the others. These are
    # distributed over the strata, hence in order of cost, too, and come last, ordered in the same way.
    last = positions >= np.uint64(rounds * len(cycle))
    strata = np.empty(len(positions), dtype=np.int64)
    visits = np.full(len(positions), rounds, dtype=np.uint64)
    turns = positions[~last]
    strata[~last] = np.array(cycle)[turns % np.uint64(len(cycle))]
    visits[~last] = turns // np.uint64(len(cycle))
    if last.any():
        which = _ordered(positions[last] - np.uint64(rounds * len(cycle)), left, key + b"last")
        strata[last] = -(-(which.astype(np.int64) + 1) * len(cycle) // left) - 1
    result = np.empty(len(positions), dtype=np.uint64)
    for stratum in np.unique(strata).tolist():
        mine = strata == stratum
        start, end = (part * rounds + part * left // len(cycle) for part in (stratum, stratum + 1))
        inside = permute(visits[mine], end - start, key + stratum.to_bytes(2, "little"))
        result[mine] = np.uint64(start) + inside
    return result
