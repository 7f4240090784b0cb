"""Byte layout of the program's accounts: the Python side of `program/state.h`.

Every record is a list of fields (name, struct code) in file order, little-endian, with explicit padding, so that
offsets are those of the C structs. A test parses `state.h` and compares field by field.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, Final

VERSION: Final = 2
RECORD_VERSION: Final = 1
MAX_MEMBERS: Final = 256
MAX_WITNESSES: Final = 32
ROUND_RING: Final = 4
INCLUSION_RING: Final = 8
MAX_RANGES: Final = 16
MAX_REQUEUE: Final = 512
MAX_BANNED: Final = 64
MAX_DELEGATES: Final = 32
COUNTER_PLANES: Final = 6
MAX_SHARE: Final = 1_000_000
UNKNOWN_SLOT: Final = 2**64 - 1


class Record:
    """A fixed-size record: named fields with `struct` codes, no implicit padding."""

    def __init__(self, name: str, fields: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self.fields = tuple(fields)
        self.offsets: dict[str, int] = {}
        self._codes: dict[str, struct.Struct] = {}
        offset = 0
        for field, code in fields:
            self.offsets[field] = offset
            self._codes[field] = struct.Struct("<" + code)
            offset += self._codes[field].size
        self.size = offset

    def get(self, data: bytes | memoryview, field: str, base: int = 0) -> Any:
        """Value of one field of the record that starts at `base`; a tuple when the field is an array."""
        values = self._codes[field].unpack_from(data, base + self.offsets[field])
        return values[0] if len(values) == 1 else values

    def span(self, field: str, base: int = 0) -> tuple[int, int]:
        """Start and end of a field in bytes."""
        start = base + self.offsets[field]
        return start, start + self._codes[field].size

    def pack(self, **values: Any) -> bytes:
        """The record's bytes; fields not named are zero. Raises struct.error for a value out of range."""
        out = bytearray(self.size)
        for field, value in values.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            self._codes[field].pack_into(out, self.offsets[field], *parts)
        return bytes(out)


def discriminator(kind: str, name: str) -> bytes:
    """Anchor's 8-byte mark: `kind` is `global` (instructions), `account` or `event`."""
    return hashlib.sha256(f"{kind}:{name}".encode()).digest()[:8]


RUN_MARK: Final = discriminator("account", "Run")
MEMBERS_MARK: Final = discriminator("account", "Members")
ROUNDS_MARK: Final = discriminator("account", "Rounds")
GRANT_MARK: Final = discriminator("account", "Grant")
RECEIPT_MARK: Final = discriminator("account", "Receipt")

INCLUSION: Final = Record("inclusion", [("round", "I"), ("flags", "I"), ("members", "4Q")])
INCLUSION_PRESENT: Final = 1
INCLUSION_VOID: Final = 2

LIMIT_FIELDS: Final = (
    "init_min_members",
    "min_members",
    "max_members",
    "witnesses",
    "overlap",
    "max_missed",
    "join_grace",
    "warmup_time",
    "max_round_train_time",
    "round_witness_time",
    "cooldown_time",
    "adaptive_grace",
    "batch",
    "rounds_per_epoch",
    "total_rounds",
    "max_share",
)
LIMITS: Final = Record("limits", [(name, "I") for name in LIMIT_FIELDS])

TERMS: Final = Record(
    "terms",
    [
        ("model_root", "32s"),
        ("layout_digest", "32s"),
        ("data_manifest", "32s"),
        ("samples", "Q"),
        ("update_bytes", "Q"),
        ("sequence_length", "I"),
        ("topk", "I"),
        ("lookahead", "B"),
        ("clip_votes", "B"),
        ("schedule", "B"),
        ("window", "B"),
        ("warmup_rounds", "I"),
        ("decay_rounds", "I"),
        ("decay_bits", "I"),
        ("peak_lr_bits", "I"),
        ("final_lr_bits", "I"),
        ("weight_decay_bits", "I"),
        ("clip_norm_bits", "I"),
        ("model_source", "64s"),
        ("data_source", "64s"),
    ],
)

COURSE: Final = Record("course", [("ramp_batch", "I"), ("ramp_rounds", "I"), ("z_loss_bits", "I"), ("reserved", "I")])

RUN: Final = Record(
    "run",
    [
        ("discriminator", "8s"),
        ("version", "I"),
        ("phase", "B"),
        ("run_id_length", "B"),
        ("request", "B"),
        ("resume_phase", "B"),
        ("owner", "32s"),
        ("members", "32s"),
        ("rounds", "32s"),
        ("join_authority", "32s"),
        ("run_id", "32s"),
        ("revision", "Q"),
        ("phase_slot", "Q"),
        ("created_slot", "Q"),
        ("cursor", "Q"),
        ("tokens", "Q"),
        ("round", "I"),
        ("epoch", "I"),
        ("final_rounds", "I"),
        ("epoch_round", "I"),
        ("member_count", "I"),
        ("active_count", "I"),
        ("checkpoint_round", "I"),
        ("config_version", "I"),
        ("seed", "32s"),
        ("checkpoint_root", "32s"),
        ("inclusion", f"{INCLUSION_RING * INCLUSION.size}s"),
        ("limits", f"{LIMITS.size}s"),
        ("terms", f"{TERMS.size}s"),
        ("reward_rate", "Q"),
        ("reward_paid", "Q"),
        ("reward_earned", "Q"),
        ("model_round", "I"),
        ("schedule_rounds", "I"),
        ("next_limits", f"{LIMITS.size}s"),
        ("course", f"{COURSE.size}s"),
        ("reserved", "448s"),
    ],
)

MEMBER: Final = Record(
    "member",
    [
        ("wallet", "32s"),
        ("node_key", "32s"),
        ("grant", "32s"),
        ("credit", "Q"),
        ("updates_included", "Q"),
        ("reward_claimed", "Q"),
        ("joined_slot", "Q"),
        ("share", "I"),
        ("next_share", "I"),
        ("joined_round", "I"),
        ("status", "B"),
        ("ready", "B"),
        ("missed", "B"),
        ("excluded", "B"),
        ("status_slot", "Q"),
        ("reward", "Q"),
    ],
)

MEMBERS: Final = Record(
    "members",
    [
        ("discriminator", "8s"),
        ("version", "I"),
        ("banned_count", "I"),
        ("run", "32s"),
        ("unused", "32s"),
        ("archived_credit", "Q"),
        ("archived_members", "Q"),
        ("reserved", "160s"),
        ("banned", f"{MAX_BANNED * 32}s"),
        ("member", f"{MAX_MEMBERS * MEMBER.size}s"),
    ],
)

RANGE: Final = Record("range", [("start", "Q"), ("count", "Q")])

ROUND: Final = Record(
    "round",
    [
        ("round", "I"),
        ("state", "B"),
        ("witness_count", "B"),
        ("range_count", "B"),
        ("first_slot", "B"),
        ("start_slot", "Q"),
        ("close_slot", "Q"),
        ("final_slot", "Q"),
        ("positions", "Q"),
        ("expected_count", "I"),
        ("committed_count", "I"),
        ("attested_count", "I"),
        ("median_elapsed", "I"),
        ("worst_requeue", "I"),
        ("attested", "I"),
        ("active", "4Q"),
        ("assigned", "4Q"),
        ("expected", "4Q"),
        ("committed", "4Q"),
        ("eligible", "4Q"),
        ("included", "4Q"),
        ("witness", "32B"),
        ("counter", f"{COUNTER_PLANES * 4}Q"),
        ("attestation", f"{MAX_WITNESSES * 4}Q"),
        ("range", f"{MAX_RANGES * RANGE.size}s"),
        ("slice_offset", f"{MAX_MEMBERS}I"),
        ("slice_count", f"{MAX_MEMBERS}I"),
        ("digest", f"{MAX_MEMBERS * 32}s"),
        ("length", f"{MAX_MEMBERS}Q"),
        ("tokens", f"{MAX_MEMBERS}Q"),
        ("fingerprint", f"{MAX_MEMBERS}Q"),
        ("commit_slot", f"{MAX_MEMBERS}Q"),
    ],
)
ROUND_UNUSED: Final = 0
ROUND_OPEN: Final = 1
ROUND_CLOSED: Final = 2
ROUND_FINAL: Final = 3

HEADER: Final = Record(
    "header",
    [
        ("discriminator", "8s"),
        ("version", "I"),
        ("phase", "B"),
        ("drain", "B"),
        ("checkpoint_agreed", "B"),
        ("pad", "B"),
        ("run", "32s"),
        ("due_slot", "Q"),
        ("round", "I"),
        ("members", "I"),
        ("active", "I"),
        ("ready", "I"),
        ("committed", "I"),
        ("attested", "I"),
        ("requeue_head", "I"),
        ("requeue_count", "I"),
        ("requeued", "Q"),
        ("checkpoint_votes", "I"),
        ("checkpoint_round", "I"),
        ("checkpoint_voted", "4Q"),
        ("checkpoint_root", "32s"),
        ("grace_slot", "Q"),
        ("reserved", "80s"),
    ],
)

ROUNDS: Final = Record(
    "rounds",
    [
        ("header", f"{HEADER.size}s"),
        ("requeue", f"{MAX_REQUEUE * RANGE.size}s"),
        ("vote", f"{MAX_MEMBERS * 32}s"),
        ("ring", f"{ROUND_RING * ROUND.size}s"),
    ],
)

GRANT: Final = Record(
    "grant",
    [
        ("discriminator", "8s"),
        ("version", "I"),
        ("delegate_count", "I"),
        ("run", "32s"),
        ("authority", "32s"),
        ("grantee", "32s"),
        ("created_slot", "Q"),
        ("run_slot", "Q"),
        ("delegate", f"{MAX_DELEGATES * 32}s"),
    ],
)

RECEIPT: Final = Record(
    "receipt",
    [
        ("discriminator", "8s"),
        ("version", "I"),
        ("reserved", "I"),
        ("run", "32s"),
        ("wallet", "32s"),
        ("payer", "32s"),
        ("credit", "Q"),
        ("updates_included", "Q"),
        ("reward", "Q"),
        ("reward_claimed", "Q"),
        ("archived_slot", "Q"),
        ("run_slot", "Q"),
    ],
)

GRANT_SIZE: Final = GRANT.size
RECEIPT_SIZE: Final = RECEIPT.size
RUN_SIZE: Final = RUN.size
MEMBERS_SIZE: Final = MEMBERS.size
ROUNDS_SIZE: Final = ROUNDS.size
HEADER_SIZE: Final = HEADER.size
ROUND_SIZE: Final = ROUND.size


def round_offset(round_number: int) -> int:
    """Where the entry of a round starts in the rounds account; it is `ROUND_SIZE` bytes long (for a data slice)."""
    return ROUNDS.offsets["ring"] + (round_number % ROUND_RING) * ROUND_SIZE
