"""What the network process tells its supervisor: events, refusals (said now and then, counted always), byte counts."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from psyche_node.identity import node_id
from psyche_node.ipc import Message
from psyche_node.network.messages import RefusalCount, Rejected, Why
from psyche_node.network.throttle import Throttle

log = logging.getLogger(__name__)
REPEAT_SECONDS = 10.0
_MAX_TRACKED = 4096
# Refusals of all peers together that are not members: each may come with a fresh key.
STRANGERS_PER_SECOND = 0.5
STRANGERS_AT_ONCE = 100.0
_STRANGERS = "strangers"


class Reporter:
    """Sends events; says a refusal once per peer, kind, class and ten seconds, and then how many it left out.

    Of peers that are not members it says 100 at once and one in two seconds. Every refusal is counted, said or not.
    """

    def __init__(
        self,
        emit: Callable[[Message], None],
        slot: Callable[[bytes], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.emit = emit
        self._slot, self._clock = slot, clock
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str, Why], tuple[float, int]] = {}
        self._refusals: Counter[tuple[str, Why]] = Counter()
        self._of_strangers = Throttle(STRANGERS_PER_SECOND, STRANGERS_AT_ONCE, clock)
        self._unsaid = 0

    def rejected(
        self, what: str, peer: bytes | str, reason: str, why: Why = Why.OTHER, *, always: bool = False
    ) -> None:
        """Count, log and report a refusal. ``peer`` is a node key, or an address when there is no key. Any thread.

        ``why`` is the class of reasons that it is counted under.
        """
        self.count(what, why)
        name = peer if isinstance(peer, str) else node_id(peer)
        member = None if isinstance(peer, str) else self._slot(peer)
        left_out = unsaid = 0
        if not always:
            now, key = self._clock(), (what, name, why)
            with self._lock:
                since, count = self._said.get(key, (-REPEAT_SECONDS, 0))
                if now - since < REPEAT_SECONDS:
                    self._said[key] = (since, count + 1)
                    return
                if member is None:
                    if not self._of_strangers.allows(_STRANGERS):
                        self._unsaid += 1
                        return
                    unsaid, self._unsaid = self._unsaid, 0
                left_out = count
                if len(self._said) >= _MAX_TRACKED:
                    self._said.pop(next(iter(self._said)))
                self._said[key] = (now, 0)
        if left_out:
            reason = f"{reason} ({left_out} more like it since the last report)"
        if unsaid:
            reason = f"{reason} (and {unsaid} refusals of others that are not members since then)"
        whose = "a peer that is not a member" if member is None else f"member {member}"
        log.warning("rejected a %s of %s, %s: %s", what, whose, name, reason)
        self.emit(Rejected(what=what, peer=name, member=member, reason=reason, why=why))

    def count(self, what: str, why: Why) -> None:
        """Count a refusal that is not worth a word. Any thread."""
        with self._lock:
            self._refusals[what, why] += 1

    def refusals(self) -> list[RefusalCount]:
        """Return how many refusals of each kind and class there were."""
        with self._lock:
            counted = sorted(self._refusals.items())
        return [RefusalCount(what=what, why=why, count=count) for (what, why), count in counted]


class Traffic:
    """Counts bytes of message bodies: by key of peers that ``named`` says yes to, and of all together. Any thread.

    ``blob`` are bytes of pieces, and ``bulk`` those of them that go over bulk connections.
    """

    def __init__(self, named: Callable[[bytes], bool] = lambda key: True) -> None:
        self._named = named
        self._lock = threading.Lock()
        # Strangers have as many keys as they like: by key they would fill memory, and the reply to GetStats.
        self._peers: dict[bytes, tuple[int, int]] = {}
        self._sent = self._received = 0
        self.blob_sent = 0
        self.blob_received = 0
        self.bulk_sent = 0
        self.bulk_received = 0

    def sent(self, peer: bytes, count: int, *, blob: bool = False, bulk: bool = False) -> None:
        with self._lock:
            self._count(peer, count, 0)
            self.blob_sent += count if blob else 0
            self.bulk_sent += count if bulk else 0

    def received(self, peer: bytes, count: int, *, blob: bool = False, bulk: bool = False) -> None:
        with self._lock:
            self._count(peer, 0, count)
            self.blob_received += count if blob else 0
            self.bulk_received += count if bulk else 0

    def _count(self, peer: bytes, sent: int, received: int) -> None:
        self._sent += sent
        self._received += received
        if self._named(peer):
            before = self._peers.get(peer, (0, 0))
            self._peers[peer] = (before[0] + sent, before[1] + received)

    def retain(self) -> None:
        """Forget the peers that ``named`` says no to by now; their bytes stay in the totals."""
        with self._lock:
            self._peers = {key: counted for key, counted in self._peers.items() if self._named(key)}

    def totals(self) -> tuple[int, int]:
        """Return (sent, received) in bytes, of all peers together."""
        with self._lock:
            return self._sent, self._received

    def per_peer(self) -> dict[bytes, tuple[int, int]]:
        """Return (sent, received) in bytes for every peer that is counted by itself."""
        with self._lock:
            return dict(self._peers)
