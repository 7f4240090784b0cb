"""The fault injector: one object that tests and ``psyche-sim`` share.

A node started with ``--fault NAME`` misbehaves in that one way, everything else about it being real.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What an adversarial node does."""

    TAMPER = "tamper"
    """Serve bytes other than those committed to on chain."""
    LENGTH = "length"
    """Commit to the digest of an update that is shorter than the layout says, under the length that the layout says."""
    OUTSIDER = "outsider"
    """Never join; announce an update and try to fetch, with a key that is not a member's."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The faults of one node; empty for an honest one."""

    active: frozenset[Fault] = frozenset()

    @classmethod
    def parse(cls, names: Iterable[str]) -> Faults:
        """Raises ValueError with the known names."""
        try:
            return cls(frozenset(Fault(name) for name in names))
        except ValueError as error:
            raise ValueError(f"{error}; the faults are: {', '.join(Fault)}") from error

    def __contains__(self, fault: object) -> bool:
        return fault in self.active

    def served(self, piece: bytes) -> bytes:
        """Return what the node serves where an honest one serves ``piece``."""
        if Fault.TAMPER not in self.active or not piece:
            return piece
        return piece[:-1] + bytes([piece[-1] ^ 1])

    def committed(self, update: bytes) -> bytes:
        """Return the update that the node commits to where an honest one commits to ``update``."""
        return update[:-7] if Fault.LENGTH in self.active else update
