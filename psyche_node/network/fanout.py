"""Who passes an update on to whom: one tree per author and round, which every node works out for itself.

The members of a round stand in a circle, in the order of a hash of the round and their node keys. An author's tree is
the heap of that circle from the author on: the author is the root, and everybody takes the update from its parent. So
nobody sends an update more than ``ARITY`` times, and it reaches N members in log N steps. When all members publish,
each has every place once: they upload exactly the same.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable

from blake3 import blake3

ARITY = 2
_CONTEXT = "psyche-node 2026-11 order of passing on: u64 round, node key"


class Tree:
    """The tree of one author's update of a round. All nodes with the same member list have the same tree."""

    def __init__(
        self, round: int, author: bytes | None, members: Iterable[bytes], private: Container[bytes] = ()
    ) -> None:
        """``members`` are node keys. Without an author, or with one who is no member, the first is the root.

        ``private`` members cannot be called, and come last: they take, and pass on only when there are many of them.
        """
        prefix = struct.pack("<Q", round)
        circle = sorted(set(members), key=lambda key: blake3(prefix + key, derive_key_context=_CONTEXT).digest())
        start = circle.index(author) if author in circle else 0
        order = [*circle[start:], *circle[:start]]
        self.order: tuple[bytes, ...] = (*order[:1], *sorted(order[1:], key=lambda key: key in private))
        self._at = {key: index for index, key in enumerate(self.order)}

    def ancestors(self, key: bytes) -> list[bytes]:
        """Return whom ``key`` takes the blob from: its parent, that one's parent, and so on up to the author.

        Whoever is not in the tree takes it from the root.
        """
        if not self.order:
            return []
        index = self._at.get(key, 1)
        path = []
        while index > 0:
            index = (index - 1) // ARITY
            path.append(self.order[index])
        return path

    def children(self, key: bytes) -> list[bytes]:
        """Return to whom ``key`` passes the blob on, at most ``ARITY``."""
        index = self._at.get(key)
        if index is None:
            return []
        return list(self.order[ARITY * index + 1 : ARITY * index + ARITY + 1])
