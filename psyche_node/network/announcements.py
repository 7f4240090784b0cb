"""The announcements this node knows, by round and member slot, and the rules by which it takes one."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum, auto

from psyche_node.network.directory import Directory
from psyche_node.network.messages import Why
from psyche_node.network.statements import Announcement, Malformed

ROUNDS_AHEAD = 8
MAX_BITMAP = 32


class Verdict(Enum):
    """What became of an announcement."""

    NEW = auto()
    KNOWN = auto()
    OUTSIDE = auto()
    """Of a round outside the window; no blame, the author may just be ahead of or behind this node."""
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    announcement: Announcement | None = None
    slot: int | None = None
    reason: str = ""
    why: Why = Why.OTHER
    """The class of ``reason``, of a REFUSED one."""


class Announcements:
    """One announcement per (member, round), of rounds in a window around the current one. Any thread."""

    def __init__(self, run: bytes, directory: Directory) -> None:
        self._run, self._directory = run, directory
        self._lock = threading.Lock()
        self._raw: dict[int, dict[bytes, bytes]] = {}
        # What was taken before need not be verified again: most of what arrives has come another way already.
        self._taken: dict[bytes, Announcement] = {}
        self.first = 0
        self._current = 0

    @property
    def current(self) -> int:
        """The newest round that this node has work in."""
        return self._current

    def reached(self, round: int) -> None:
        """Move the window forward: this node has work in ``round``."""
        self._current = max(self._current, round)

    def forget(self, before_round: int) -> None:
        with self._lock:
            self.first = max(self.first, before_round)
            self._current = max(self._current, self.first)
            for round in [round for round in self._raw if round < self.first]:
                for raw in self._raw.pop(round).values():
                    self._taken.pop(raw, None)

    def offer(self, raw: bytes) -> Outcome:
        """Take the wire form of an announcement if it is well-formed, a member's, in the window and the first there.

        A REFUSED outcome carries the announcement when its signature is good: then its author is to blame, and
        otherwise whoever passed it on.
        """
        try:
            announcement = self._taken.get(raw) or Announcement.parse(raw, self._run)
        except Malformed as error:
            return Outcome(Verdict.REFUSED, reason=str(error), why=Why.MALFORMED)
        slot = self._directory.slot(announcement.node_key)
        if slot is None:
            return Outcome(
                Verdict.REFUSED, announcement, None, "its author is not a member of the run", Why.NOT_A_MEMBER
            )
        with self._lock:
            if not self.first <= announcement.round <= self._current + ROUNDS_AHEAD:
                return Outcome(Verdict.OUTSIDE, announcement, slot)
            known = self._raw.setdefault(announcement.round, {})
            if announcement.node_key not in known:
                known[announcement.node_key] = raw
                self._taken[raw] = announcement
                return Outcome(Verdict.NEW, announcement, slot)
            if known[announcement.node_key] == raw:
                return Outcome(Verdict.KNOWN, announcement, slot)
        return Outcome(
            Verdict.REFUSED,
            announcement,
            slot,
            f"a second, different announcement for round {announcement.round}",
            Why.CONTRADICTION,
        )

    def of(self, round: int, author: bytes) -> Announcement | None:
        """Return what the node with key ``author`` has announced for ``round``, or None."""
        with self._lock:
            raw = self._raw.get(round, {}).get(author)
        return None if raw is None else Announcement.parse(raw, self._run)

    def bitmap(self, round: int) -> bytes:
        """Return the member slots whose announcement of ``round`` is known: bit i of byte i/8."""
        bits = bytearray(MAX_BITMAP)
        with self._lock:
            keys = list(self._raw.get(round, ()))
        for key in keys:
            if (slot := self._directory.slot(key)) is not None:
                bits[slot // 8] |= 1 << slot % 8
        return bytes(bits).rstrip(b"\0")

    def missing_from(self, round: int, have: bytes) -> list[bytes]:
        """Return the wire forms of the announcements of ``round`` that are not in the bitmap ``have``."""
        with self._lock:
            known = list(self._raw.get(round, {}).items())
        return [
            raw
            for key, raw in known
            if (slot := self._directory.slot(key)) is not None
            and not (slot // 8 < len(have) and have[slot // 8] >> slot % 8 & 1)
        ]
