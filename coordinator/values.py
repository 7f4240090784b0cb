"""Values of a run: what the decoders in `state.py` return and what the instruction builders take.

All integers are unsigned; slots are the chain's slots, positions are indices into the shuffled data, shares have no
unit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from solders.pubkey import Pubkey

from coordinator.layout import MAX_MEMBERS, UNKNOWN_SLOT


class Phase(IntEnum):
    """The run's state, under the names that operators know."""

    UNINITIALIZED = 0
    WAITING_FOR_MEMBERS = 1
    WARMUP = 2
    ROUND_TRAIN = 3
    ROUND_WITNESS = 4
    COOLDOWN = 5
    FINISHED = 6
    PAUSED = 7


class Request(IntEnum):
    """What the owner has asked for and a tick has not brought about yet."""

    NONE = 0
    PAUSE = 1
    FINISH = 2


class MemberStatus(IntEnum):
    """What a member's slot says of it. Only ACTIVE members are assigned data."""

    EMPTY = 0
    PENDING = 1
    ACTIVE = 2
    DESYNCED = 3
    DROPPED = 4
    LEFT = 5
    EJECTED = 6


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes, quorums and deadlines of a run. Times and graces are slots, `batch` is positions per round.

    `witnesses` 0 elects every active member, up to 32. `overlap` is 0 or 1. `join_grace` counts from the join that
    reached `init_min_members`. `adaptive_grace` is added to 1.5 x the median commit time.
    `max_share` bounds the share that a member may ask for; 0 leaves the general bound of 1,000,000.
    """

    init_min_members: int
    min_members: int
    max_members: int
    witnesses: int
    overlap: int
    max_missed: int
    join_grace: int
    warmup_time: int
    max_round_train_time: int
    round_witness_time: int
    cooldown_time: int
    adaptive_grace: int
    batch: int
    rounds_per_epoch: int
    total_rounds: int
    max_share: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What is trained: model, data and optimizer settings that every member must share.

    Roots and digests are 32 bytes. `*_bits` are fp32 bit patterns (`float_bits`). `schedule`: 0 constant, 1 linear, 2
    cosine, 3 warm-up, stable, decay. `window`: the trend of the votes forgets over 2^window rounds. Sources are at most
    64 UTF-8 bytes each. The first round under these terms has `ramp_batch` positions; `ramp_rounds` later it is the
    limits' `batch` (0: from the first round on).
    """

    model_root: bytes
    layout_digest: bytes
    data_manifest: bytes
    samples: int
    sequence_length: int
    update_bytes: int
    topk: int
    lookahead: bool
    clip_votes: bool
    schedule: int
    window: int
    warmup_rounds: int
    decay_rounds: int
    decay_bits: int
    peak_lr_bits: int
    final_lr_bits: int
    weight_decay_bits: int
    clip_norm_bits: int
    model_source: str
    data_source: str
    ramp_batch: int = 0
    ramp_rounds: int = 0
    z_loss_bits: int = 0


@dataclass(frozen=True, slots=True)
class InclusionSet:
    """The members (slots) whose update counts in a round. `void`: nothing counts and nothing is applied."""

    round: int
    members: frozenset[int]
    void: bool


@dataclass(frozen=True, slots=True)
class Run:
    """The run account. `member_count` and `active_count` are those of the last tick; `Header` has them live.

    Every round below `final_rounds` has a final inclusion set, and the weights on which `round` is trained contain
    exactly those. `inclusion` holds the last 8 final sets, newest last. In COOLDOWN and FINISHED `round` is the next
    round to train, and equals `final_rounds`. `checkpoint_root` is the model root before `checkpoint_round` (the start
    model for 0). The learning-rate schedule counts from `model_round` and spans `schedule_rounds`. `next_limits`
    hold from the next round on. Rewards are lamports; `reward_rate` is per million tokens. `resume_phase` says where a
    paused run goes on.
    """

    version: int
    owner: Pubkey
    run_id: str
    phase: Phase
    round: int
    epoch: int
    phase_slot: int
    final_rounds: int
    epoch_round: int
    cursor: int
    seed: bytes
    checkpoint_root: bytes
    checkpoint_round: int
    inclusion: tuple[InclusionSet, ...]
    limits: Limits
    terms: Terms
    member_count: int
    active_count: int
    members_address: Pubkey
    rounds_address: Pubkey
    join_authority: Pubkey | None
    tokens: int
    revision: int
    created_slot: int
    request: Request
    resume_phase: Phase
    config_version: int
    next_limits: Limits | None
    model_round: int
    schedule_rounds: int
    reward_rate: int
    reward_earned: int
    reward_paid: int

    def inclusion_set(self, round_number: int) -> InclusionSet | None:
        """The final inclusion set of a round, or None when it is not final or no longer kept (8 rounds)."""
        return next((kept for kept in self.inclusion if kept.round == round_number), None)


@dataclass(frozen=True, slots=True)
class Member:
    """One slot of the member table. `credit` is tokens in included updates; `missed` counts rounds without a
    commitment in a row, `excluded` rounds whose commitment was not included. `status_slot` is when the status changed
    last; `reward` and `reward_claimed` are lamports; `grant` is the authorization under which it joined."""

    slot: int
    wallet: Pubkey
    node_key: bytes
    status: MemberStatus
    share: int
    next_share: int
    joined_round: int
    joined_slot: int
    missed: int
    excluded: int
    credit: int
    updates_included: int
    ready: bool
    grant: Pubkey | None
    status_slot: int
    reward: int
    reward_claimed: int

    @property
    def live(self) -> bool:
        """Whether the member takes part, or is about to."""
        return self.status in (MemberStatus.PENDING, MemberStatus.ACTIVE, MemberStatus.DESYNCED)


@dataclass(frozen=True, slots=True)
class Membership:
    """What the members account holds besides the members: keys that are banned, and credit that lies in receipts."""

    banned: tuple[Pubkey, ...]
    archived_credit: int
    archived_members: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Who may join a run that has a join authority. `grantee` None: anyone. Delegates are the grantee's other keys.
    `run_slot` is when the run was created; a later run of the same name is another one."""

    run: Pubkey
    authority: Pubkey
    grantee: Pubkey | None
    delegates: tuple[Pubkey, ...]
    created_slot: int
    run_slot: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Credit of a member whose slot was given to others. Its wallet gets it back by `restore`."""

    run: Pubkey
    wallet: Pubkey
    payer: Pubkey
    credit: int
    updates_included: int
    reward: int
    reward_claimed: int
    archived_slot: int
    run_slot: int


@dataclass(frozen=True, slots=True)
class Commitment:
    """What a member committed to in a round: digest and length of its update, tokens trained, fingerprint of the
    weights it was trained on, and the slot at which the chain saw it."""

    member: int
    digest: bytes
    length: int
    tokens: int
    fingerprint: int
    slot: int


@dataclass(frozen=True, slots=True)
class Round:
    """One of the four rounds that the chain keeps in full.

    `ranges` are (start, count) of positions; concatenated, they are the round's batch, and `slices[slot]` is (offset,
    count) in that concatenation. A member whose count is 0 has nothing to train and cannot commit. `closed`: no more
    commitments, attestations are accepted until `final`. Attestations of desynced members' updates are not counted
    (`eligible`).
    """

    round: int
    start_slot: int
    active: frozenset[int]
    witnesses: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    slices: dict[int, tuple[int, int]]
    commitments: dict[int, Commitment]
    attestations: dict[int, frozenset[int]]
    closed: bool
    final: bool
    eligible: frozenset[int]
    included: frozenset[int]
    expected: frozenset[int]
    close_slot: int
    final_slot: int

    def positions(self, slot: int) -> list[int]:
        """The positions that the member in `slot` trains in this round, in order; empty when it has none."""
        offset, count = self.slices.get(slot, (0, 0))
        positions: list[int] = []
        for start, size in self.ranges:
            low, high = max(offset, 0), min(offset + count, size)
            if low < high:
                positions.extend(range(start + low, start + high))
            offset -= size
        return positions


@dataclass(frozen=True, slots=True)
class Header:
    """First bytes of the rounds account: what moves between ticks.

    `due_slot` is the first slot at which `tick` succeeds (`UNKNOWN_SLOT`: not known yet). `committed` counts the
    current round, `attested` the oldest round that is closed and not final, `ready` the members ready in WARMUP.
    """

    phase: Phase
    due_slot: int
    round: int
    members: int
    active: int
    ready: int
    committed: int
    attested: int
    draining: bool
    requeued: int
    requeue_ranges: int
    checkpoint_votes: int
    checkpoint_agreed: bool

    def due(self, slot: int) -> bool:
        """Whether a `tick` in `slot` succeeds."""
        return self.due_slot != UNKNOWN_SLOT and slot >= self.due_slot


def float_bits(value: float) -> int:
    """The fp32 bit pattern of `value`, rounded to nearest. Raises OverflowError beyond fp32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def bitmap_words(slots: Iterable[int]) -> tuple[int, int, int, int]:
    """Four 64-bit words with the bits of `slots` set. Raises ValueError for a slot outside 0..255."""
    words = [0, 0, 0, 0]
    for slot in slots:
        if not 0 <= slot < MAX_MEMBERS:
            raise ValueError(f"member slot {slot} is outside 0..{MAX_MEMBERS - 1}")
        words[slot // 64] |= 1 << (slot % 64)
    return words[0], words[1], words[2], words[3]


def slots_of(words: Iterable[int]) -> frozenset[int]:
    """The slots whose bits are set in a bitmap of 64-bit words."""
    bitmap = sum(word << (64 * index) for index, word in enumerate(words))
    return frozenset(slot for slot in range(bitmap.bit_length()) if bitmap >> slot & 1)
