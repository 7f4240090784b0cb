"""What a person watching a run wants to know, worked out from snapshots as they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coordinator.admin.costs import Costs, estimate
from coordinator.admin.health import EndpointHealth
from coordinator.run_report import active_words
from coordinator.snapshot import Snapshot
from coordinator.state import UNKNOWN_SLOT, Phase, Round

_REMEMBERED: Final = 16
_PACE_ROUNDS: Final = 20


@dataclass(slots=True)
class Watched:
    """A run as it is now. Times are seconds.

    `slot` runs on between two looks at the chain, by the measured `slot_seconds`; `silent` is how long the chain has
    not answered.
    """

    now: Snapshot
    slot: float
    slot_seconds: float
    pushes: bool
    endpoints: Sequence[EndpointHealth] = ()
    silent: float = 0.0
    paces: list[tuple[int, int, int]] = field(default_factory=list)
    """(slot, final rounds, tokens) when they changed, newest last."""
    seen: dict[int, Round] = field(default_factory=dict)
    """Rounds in full, some of which the chain no longer keeps."""

    @property
    def left(self) -> float | None:
        """Until the next transition is due; None when it is not known, 0 when it is due."""
        due = self.now.header.due_slot
        if due == UNKNOWN_SLOT or self.now.run.phase is Phase.FINISHED:
            return None
        return max((due - self.slot) * self.slot_seconds, 0.0)

    @property
    def in_phase(self) -> float:
        return max((self.slot - self.now.run.phase_slot) * self.slot_seconds, 0.0)

    @property
    def current(self) -> Round | None:
        """The round that is being trained or witnessed."""
        return next((entry for entry in self.now.rounds if entry.round == self.now.run.round), None)

    @property
    def share_done(self) -> float:
        return min(self.now.run.final_rounds / self.now.run.limits.total_rounds, 1.0)

    @property
    def round_seconds(self) -> float | None:
        """A round takes this long, over the rounds seen; else over those that the chain keeps."""
        if len(self.paces) > 1:
            (first, rounds, _), (last, more, _) = self.paces[0], self.paces[-1]
            if more > rounds:
                return (last - first) * self.slot_seconds / (more - rounds)
        starts = [entry.start_slot for entry in self.now.rounds]
        if len(starts) > 1:
            return (starts[-1] - starts[0]) * self.slot_seconds / (len(starts) - 1)
        return None

    @property
    def tokens_per_round(self) -> float:
        """In included updates."""
        if len(self.paces) > 1 and self.paces[-1][1] > self.paces[0][1]:
            return (self.paces[-1][2] - self.paces[0][2]) / (self.paces[-1][1] - self.paces[0][1])
        final = self.now.run.final_rounds
        return self.now.run.tokens / final if final else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self.round_seconds
        return self.tokens_per_round / seconds if seconds else None

    @property
    def seconds_to_end(self) -> float | None:
        seconds = self.round_seconds
        run = self.now.run
        return None if seconds is None else seconds * max(run.limits.total_rounds - run.final_rounds, 0)

    @property
    def costs(self) -> Costs:
        return estimate(self.now, self.tokens_per_round)

    @property
    def waits_for(self) -> str:
        """What the state waits for, in words."""
        run, header = self.now.run, self.now.header
        current = self.current
        expected = len(current.expected) if current is not None else header.active
        match run.phase:
            case Phase.WAITING_FOR_MEMBERS:
                return f"{header.members:,} of {run.limits.init_min_members:,} members have joined"
            case Phase.WARMUP:
                return f"{header.ready:,} of {header.members:,} members are ready"
            case Phase.ROUND_TRAIN:
                return f"{header.committed:,} of {expected:,} have committed"
            case Phase.ROUND_WITNESS:
                open_round = next((entry for entry in self.now.rounds if entry.closed and not entry.final), None)
                of = len(open_round.witnesses) if open_round is not None else 0
                return f"{header.attested:,} of {of:,} witnesses have attested"
            case Phase.COOLDOWN:
                agreed = (
                    "agreed" if header.checkpoint_agreed else f"{header.checkpoint_votes:,} of {header.active:,} votes"
                )
                return f"the checkpoint's model root: {agreed}"
            case Phase.PAUSED:
                return "the owner to resume"
            case _:
                return "nothing more"

    def follow(self, now: Snapshot) -> None:
        """A newer snapshot."""
        self.now = now
        self.seen.update((entry.round, entry) for entry in now.rounds)
        for old in sorted(self.seen)[:-_REMEMBERED]:
            del self.seen[old]
        point = (now.slot, now.run.final_rounds, now.run.tokens)
        if not self.paces or self.paces[-1][1] != point[1]:
            self.paces.append(point)
            # The pace of the last twenty rounds: long enough to be steady, short enough to follow a change.
            del self.paces[: -_PACE_ROUNDS - 1]

    def to_json(self) -> dict[str, Any]:
        """One line of `run watch --json`."""
        run, header = self.now.run, self.now.header
        return {
            "slot": self.now.slot,
            "state": run.phase.name,
            "request": run.request.name,
            "seconds_in_state": round(self.in_phase, 2),
            "seconds_left": None if self.left is None else round(self.left, 2),
            "waits_for": self.waits_for,
            "round": run.round,
            "final_rounds": run.final_rounds,
            "total_rounds": run.limits.total_rounds,
            "epoch": run.epoch,
            "members": header.members,
            "active": header.active,
            "committed": header.committed,
            "attested": header.attested,
            "tokens": run.tokens,
            "checkpoint_round": run.checkpoint_round,
        }

    def line(self) -> str:
        """One line of text for where there is no terminal."""
        run, header = self.now.run, self.now.header
        left = "" if self.left is None else f", next step in {self.left:.1f} s" if self.left else ", next step due"
        return (
            f"slot {self.now.slot} {run.phase.name} round {run.round}/{run.limits.total_rounds} epoch {run.epoch}: "
            f"{self.waits_for}{left}; {active_words(run, header)}, {run.tokens} tokens"
        )
