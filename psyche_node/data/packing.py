"""Best-fit-decreasing packing of documents into sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of document numbers; the lengths in a bin sum to at most ``capacity``.

    Documents go in by length, longest first (ties: in order), each into the open bin that it fills best (ties: the one
    that reached that room last). A bit per amount of room finds that bin in constant time, so this is linear in the
    number of documents.

    Raises:
        ValueError: a length is not between 1 and ``capacity``.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while some open bin has exactly r tokens of room
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length = lengths[document]
        if not 1 <= length <= capacity:
            raise ValueError(f"document {document} has {length} tokens; a sequence holds 1 to {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(document)
        else:
            room, chosen = capacity, len(bins)
            bins.append([document])
        left = room - length
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    return bins
