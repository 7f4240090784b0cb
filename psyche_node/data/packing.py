"""Best-fit-decreasing packing of documents into sequences of one length, and what attention to each of them costs.

Memory is some 30 bytes per document, whatever their lengths.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
_CHUNK = 1 << 16  # documents that are Python objects at the same time


def pack(lengths: npt.ArrayLike, capacity: int) -> I64:
    """Return the sequence, numbered from 0, of each document; lengths in one sum to at most ``capacity``.

    ``lengths`` (n,) are in tokens; int32 takes least memory. Documents go in by length, longest first (ties: in order),
    each into the open sequence that it fills best (ties: the one that reached that room last). A bit per amount of
    room finds it in constant time, so this is linear in the number of documents.

    Raises:
        ValueError: a length is not between 1 and ``capacity``.
    """
    sizes = np.asarray(lengths)
    if sizes.dtype.kind != "i":
        sizes = sizes.astype(np.int64)
    if (wrong := np.flatnonzero((sizes < 1) | (sizes > capacity))).size:
        first = int(wrong[0])
        raise ValueError(f"document {first} has {sizes[first]} tokens; a sequence holds 1 to {capacity}")
    order = np.argsort(-sizes, kind="stable")
    result = np.empty(len(sizes), dtype=np.int64)
    newest = array("q", [-1]) * (capacity + 1)  # by room: the open sequence that has so much since the shortest time
    older = array("q")  # by sequence: the one that has had as much room for longer; -1 ends the chain
    rooms = 0  # bit r is set while some open sequence has exactly r tokens of room
    for start in range(0, len(sizes), _CHUNK):
        documents = order[start : start + _CHUNK]
        chosen = []
        for length in sizes[documents].tolist():
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                sequence = newest[room]
                newest[room] = older[sequence]
                if newest[room] < 0:
                    rooms ^= 1 << room
            else:
                room, sequence = capacity, len(older)
                older.append(-1)
            if left := room - length:
                older[sequence] = newest[left]
                newest[left] = sequence
                rooms |= 1 << left
            chosen.append(sequence)
        result[documents] = chosen
    return result


def attention_costs(lengths: npt.ArrayLike, sequences: I64) -> I64:
    """Return by sequence the sum of its documents' squared lengths: what attention inside documents costs.

    Exact for sequences of at most 2**26 tokens: the sums are below 2**53, where float64 still counts by one.
    """
    squares = np.asarray(lengths, dtype=np.float64) ** 2
    return np.bincount(sequences, weights=squares).astype(np.int64)
