"""What the simulation saw on chain, put together from one look after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from coordinator.client import Pulse
from coordinator.state import Member, Phase, Round


@dataclass(slots=True)
class ChainRecord:
    """What the simulation saw on chain."""

    rounds_started: dict[int, float] = field(default_factory=dict)
    included: dict[int, frozenset[int] | None] = field(default_factory=dict)
    committed: dict[int, frozenset[int]] = field(default_factory=dict)
    active: dict[int, frozenset[int]] = field(default_factory=dict)
    positions: dict[int, list[int]] = field(default_factory=dict)
    finished_at: float | None = None
    pulse: Pulse | None = None
    members: tuple[Member, ...] = ()

    def see(self, pulse: Pulse, rounds: tuple[Round, ...], members: tuple[Member, ...]) -> None:
        now = time.time()
        self.pulse, self.members = pulse, members
        if pulse.run.phase is Phase.FINISHED and self.finished_at is None:
            self.finished_at = now
        for inclusion in pulse.run.inclusion:
            self.included[inclusion.round] = None if inclusion.void else inclusion.members
        for record in rounds:
            # A round that began and ended between two looks is known from here.
            self.rounds_started.setdefault(record.round, now)
            self.positions[record.round] = [
                position for start, count in record.ranges for position in range(start, start + count)
            ]
            self.committed[record.round] = frozenset(record.commitments)
            self.active[record.round] = record.active
