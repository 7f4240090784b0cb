"""States of a run for the node's tests: only what a test names differs from a quiet run of four members."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from solders.pubkey import Pubkey

from coordinator.client import Pulse
from coordinator.layout import UNKNOWN_SLOT
from coordinator.state import (
    Commitment,
    Header,
    InclusionSet,
    Limits,
    Member,
    MemberStatus,
    Phase,
    Request,
    Round,
    Run,
    Terms,
)

MEMBERS = frozenset(range(4))
KEY = Pubkey.from_bytes(bytes(range(32)))

LIMITS = Limits(
    init_min_members=4,
    min_members=2,
    max_members=256,
    witnesses=0,
    overlap=1,
    max_missed=2,
    join_grace=1,
    warmup_time=100,
    max_round_train_time=100,
    round_witness_time=10,
    cooldown_time=100,
    adaptive_grace=2,
    batch=8,
    rounds_per_epoch=3,
    total_rounds=6,
)
TERMS = Terms(
    model_root=bytes(32),
    layout_digest=bytes(32),
    data_manifest=bytes(32),
    samples=100,
    sequence_length=16,
    update_bytes=96,
    topk=8,
    lookahead=True,
    clip_votes=True,
    window=3,
    schedule=0,
    warmup_rounds=0,
    decay_rounds=0,
    decay_bits=0,
    peak_lr_bits=0,
    final_lr_bits=0,
    weight_decay_bits=0,
    clip_norm_bits=0,
    model_source="",
    data_source="",
)
RUN = Run(
    version=2,
    owner=KEY,
    run_id="test",
    phase=Phase.ROUND_TRAIN,
    round=0,
    epoch=0,
    phase_slot=0,
    final_rounds=0,
    epoch_round=0,
    cursor=0,
    seed=bytes(32),
    checkpoint_root=bytes(32),
    checkpoint_round=0,
    inclusion=(),
    limits=LIMITS,
    terms=TERMS,
    member_count=4,
    active_count=4,
    members_address=KEY,
    rounds_address=KEY,
    join_authority=None,
    tokens=0,
    revision=0,
    created_slot=0,
    request=Request.NONE,
    resume_phase=Phase.UNINITIALIZED,
    config_version=0,
    next_limits=None,
    model_round=0,
    schedule_rounds=100,
    reward_rate=0,
    reward_earned=0,
    reward_paid=0,
)


def pulse_of(
    phase: Phase = Phase.ROUND_TRAIN,
    round: int = 0,
    *,
    slot: int = 0,
    sets: Iterable[InclusionSet] = (),
    overlap: int = 1,
    due: int = UNKNOWN_SLOT,
    committed: int = 0,
    members: int = 4,
    draining: bool = False,
    **fields: Any,
) -> Pulse:
    """The run in this phase of this round. ``sets`` are the final inclusion sets that the chain still keeps."""
    inclusion = tuple(sets)
    fields.setdefault("final_rounds", inclusion[-1].round + 1 if inclusion else 0)
    fields.setdefault("limits", dataclasses.replace(LIMITS, overlap=overlap))
    run = dataclasses.replace(RUN, phase=phase, round=round, inclusion=inclusion, **fields)
    header = Header(
        phase=phase,
        due_slot=due,
        round=round,
        members=members,
        active=members,
        ready=0,
        committed=committed,
        attested=0,
        draining=draining,
        requeued=0,
        requeue_ranges=0,
        checkpoint_votes=0,
        checkpoint_agreed=False,
    )
    return Pulse(slot, run, header)


def included(round: int, members: Iterable[int] = MEMBERS) -> InclusionSet:
    members = frozenset(members)
    return InclusionSet(round=round, members=members, void=not members)


def commitment(member: int, digest: bytes = bytes(32), length: int = 96) -> Commitment:
    return Commitment(member=member, digest=digest, length=length, tokens=10, fingerprint=7, slot=3)


def round_of(number: int, commitments: Iterable[Commitment] = (), **fields: Any) -> Round:
    """A round of four members and eight positions, two for each."""
    values: dict[str, Any] = {
        "round": number,
        "start_slot": 0,
        "active": MEMBERS,
        "witnesses": tuple(MEMBERS),
        "ranges": ((number * 8, 8),),
        "slices": {slot: (2 * slot, 2) for slot in MEMBERS},
        "commitments": {one.member: one for one in commitments},
        "attestations": {},
        "closed": True,
        "final": False,
        "eligible": MEMBERS,
        "included": frozenset(),
        "expected": MEMBERS,
        "close_slot": 0,
        "final_slot": 0,
    }
    return Round(**{**values, **fields})


def member_of(slot: int, status: MemberStatus = MemberStatus.ACTIVE) -> Member:
    return Member(
        slot=slot,
        wallet=Pubkey.from_bytes(bytes([slot + 1]) * 32),
        node_key=bytes([slot]) * 32,
        status=status,
        share=1000,
        next_share=1000,
        joined_round=0,
        joined_slot=0,
        missed=0,
        excluded=0,
        credit=0,
        updates_included=0,
        ready=False,
        grant=None,
        status_slot=0,
        reward=0,
        reward_claimed=0,
    )
