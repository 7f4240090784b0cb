"""Who passes an update on to whom: one tree per blob, which every node works out for itself.

The author is the root. The other members follow in the order of a hash of the blob's digest and their node keys, those
that are behind NAT last, and each takes the blob from its parent in the heap of that order. So nobody sends a blob more
than ``ARITY`` times, a blob reaches N members in log N steps, and since every blob has another order, the work is
spread evenly. Members that nobody can fetch from are leaves, as long as they are fewer than half.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from blake3 import blake3

ARITY = 2
_CONTEXT = "psyche-node 2026-11 order of passing on: digest of the blob, node key"


class Tree:
    """The tree of one blob over a member list. All nodes with the same list have the same tree."""

    def __init__(
        self, digest: bytes, author: bytes | None, members: Iterable[bytes], private: Container[bytes] = ()
    ) -> None:
        """``members`` are node keys; the ``author`` becomes the root, or the first in the order when there is none.

        ``private`` are those of them that others cannot open a connection to.
        """
        others = sorted(
            (key for key in set(members) if key != author),
            key=lambda key: (key in private, blake3(digest + key, derive_key_context=_CONTEXT).digest()),
        )
        self.order: tuple[bytes, ...] = (*([] if author is None else [author]), *others)
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
