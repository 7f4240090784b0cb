"""What peers may take from this node: open streams, bytes of each blob, and in which order. Any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from psyche_node.network.blobs import PIECE_BYTES
from psyche_node.network.guard import Place, Streams
from psyche_node.network.turns import Rank, Turns

# A peer needs a blob once. Twice is for one that lost what it had; the rest is for pieces that it got from two sources.
COPIES_PER_PEER = 2
SLACK_BYTES = 64 * PIECE_BYTES
_MAX_COUNTED = 16_384


class Allowances:
    """Bytes of each blob that each peer has taken. The pair that is idle longest is forgotten first."""

    def __init__(self) -> None:
        self._taken: OrderedDict[tuple[bytes, bytes], int] = OrderedDict()
        self._lock = threading.Lock()

    def allows(self, peer: bytes, digest: bytes, length: int, count: int) -> bool:
        """Count ``count`` bytes of a blob of ``length`` bytes, unless that is more than a peer may take."""
        with self._lock:
            taken = self._taken.pop((peer, digest), 0)
            allowed = taken + count <= COPIES_PER_PEER * length + SLACK_BYTES
            self._taken[peer, digest] = taken + count if allowed else taken
            while len(self._taken) > _MAX_COUNTED:
                self._taken.popitem(last=False)
            return allowed


@dataclass(frozen=True, slots=True)
class Upload:
    """One open stream of pieces."""

    place: Place
    number: int


class Uploads:
    """The open uploads of this node."""

    def __init__(self) -> None:
        self._streams = Streams()
        self._turns = Turns()
        self._allowances = Allowances()

    def enter(self, peer: bytes, rank: Rank, end: Callable[[], object]) -> Upload | None:
        """Open an upload whose call ``end`` ends; None: this peer, or all, have too many."""
        place = self._streams.enter(peer, end)
        return None if place is None else Upload(place, self._turns.enter(rank))

    def leave(self, upload: Upload) -> None:
        """End it."""
        self._turns.leave(upload.number)
        self._streams.leave(upload.place)

    def next_piece(self, upload: Upload, digest: bytes, length: int, count: int) -> bool:
        """Wait until it is this upload's turn to send ``count`` bytes of a blob of ``length`` bytes.

        That is when nothing more urgent is being sent, or a second later. Returns False when the peer has had enough.
        """
        self._turns.wait(upload.number)
        self._streams.moves(upload.place)
        return self._allowances.allows(upload.place.peer, digest, length, count)
