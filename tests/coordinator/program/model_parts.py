"""What the model of a run consists of: members, rounds, grants and receipts, named as in the decoded accounts."""

from __future__ import annotations

from dataclasses import dataclass, field

from solders.pubkey import Pubkey

from coordinator.values import Commitment, MemberStatus

PENDING, ACTIVE, DESYNCED = MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED
LIVE = (PENDING, ACTIVE, DESYNCED)


@dataclass(slots=True)
class ModelMember:
    wallet: Pubkey
    node_key: bytes = b""
    grant: Pubkey | None = None
    status: MemberStatus = MemberStatus.EMPTY
    share: int = 0
    next_share: int = 0
    joined_round: int = 0
    joined_slot: int = 0
    status_slot: int = 0
    missed: int = 0
    excluded: int = 0
    credit: int = 0
    updates_included: int = 0
    reward: int = 0
    reward_claimed: int = 0
    ready: bool = False

    @property
    def live(self) -> bool:
        return self.status in LIVE

    def become(self, status: MemberStatus, slot: int) -> None:
        self.status, self.status_slot, self.ready = status, slot, False


@dataclass(slots=True)
class ModelRound:
    round: int
    start_slot: int
    active: set[int] = field(default_factory=set)
    witnesses: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    slices: dict[int, tuple[int, int]] = field(default_factory=dict)
    commitments: dict[int, Commitment] = field(default_factory=dict)
    attestations: dict[int, frozenset[int]] = field(default_factory=dict)
    closed: bool = False
    final: bool = False
    eligible: set[int] = field(default_factory=set)
    included: set[int] = field(default_factory=set)
    expected: set[int] = field(default_factory=set)
    close_slot: int = 0
    final_slot: int = 0
    median: int | None = None

    @property
    def in_flight(self) -> bool:
        return not self.final

    def counting(self) -> set[int]:
        """Members with a commitment that has not been thrown out."""
        return self.commitments.keys() & self.expected

    def positions(self, slot: int) -> list[int]:
        offset, count = self.slices.get(slot, (0, 0))
        batch = [position for start, size in self.ranges for position in range(start, start + size)]
        return batch[offset : offset + count]


@dataclass(slots=True)
class ModelGrant:
    authority: Pubkey
    grantee: Pubkey | None
    delegates: list[Pubkey] = field(default_factory=list)


@dataclass(slots=True)
class ModelReceipt:
    wallet: Pubkey
    payer: Pubkey
    credit: int
    updates_included: int
    reward: int
    reward_claimed: int
