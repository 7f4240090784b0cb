"""The run as it stands on chain: values decoded from the program's three accounts.

Nothing here decides anything: which updates count, who is a member and when a transition is due is read, not computed.
Layout and offsets: `layout.py`. All integers are little-endian; slots are the chain's slots, positions are indices
into the shuffled data, shares have no unit.
"""

from __future__ import annotations

from solders.pubkey import Pubkey

from coordinator import layout
from coordinator.layout import (
    COURSE,
    GRANT,
    GRANT_SIZE,
    HEADER,
    HEADER_SIZE,
    INCLUSION,
    LIMIT_FIELDS,
    LIMITS,
    MAX_MEMBERS,
    MEMBER,
    MEMBERS,
    MEMBERS_SIZE,
    RANGE,
    RECEIPT,
    RECEIPT_SIZE,
    ROUND,
    ROUND_RING,
    ROUND_SIZE,
    ROUNDS,
    ROUNDS_SIZE,
    RUN,
    RUN_SIZE,
    TERMS,
    UNKNOWN_SLOT,
    Record,
)
from coordinator.values import (
    Commitment,
    Grant,
    Header,
    InclusionSet,
    Limits,
    Member,
    Membership,
    MemberStatus,
    Phase,
    Receipt,
    Request,
    Round,
    Run,
    Terms,
    bitmap_words,
    float_bits,
    slots_of,
)

__all__ = [
    "HEADER_SIZE",
    "MEMBERS_SIZE",
    "ROUNDS_SIZE",
    "ROUND_SIZE",
    "RUN_SIZE",
    "UNKNOWN_SLOT",
    "Commitment",
    "Grant",
    "Header",
    "InclusionSet",
    "Limits",
    "MalformedAccount",
    "Member",
    "MemberStatus",
    "Membership",
    "Phase",
    "Receipt",
    "Request",
    "Round",
    "Run",
    "Terms",
    "bitmap_words",
    "decode_grant",
    "decode_header",
    "decode_members",
    "decode_membership",
    "decode_receipt",
    "decode_requeue",
    "decode_round",
    "decode_rounds",
    "decode_run",
    "float_bits",
    "slots_of",
]


class MalformedAccount(ValueError):
    """Account data that is not what the program writes. Says which account, what was found and what was expected."""


def _check(data: bytes, record: Record, size: int, mark: bytes, version: int = layout.VERSION) -> None:
    if len(data) < size:
        raise MalformedAccount(
            f"{record.name} account has {len(data)} bytes, expected {size}; is this the right address?"
        )
    if data[:8] != mark:
        raise MalformedAccount(f"{record.name} account starts with {data[:8].hex()}, expected {mark.hex()}")
    found = record.get(data, "version")
    if found != version:
        advice = "the owner can bring it here with psyche-admin run migrate" if found < version else "upgrade"
        raise MalformedAccount(
            f"{record.name} account has layout version {found}, this version reads {version}; {advice}"
        )


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedAccount(f"{what} is not UTF-8: {raw.hex()}") from error


def _phase(value: int) -> Phase:
    try:
        return Phase(value)
    except ValueError as error:
        raise MalformedAccount(f"run phase {value} is unknown to this version; upgrade psyche-node") from error


def _request(value: int) -> Request:
    try:
        return Request(value)
    except ValueError as error:
        raise MalformedAccount(f"owner's request {value} is unknown to this version; upgrade psyche-node") from error


def _key_or_none(raw: bytes) -> Pubkey | None:
    return Pubkey.from_bytes(raw) if any(raw) else None


def _keys(raw: bytes, count: int, most: int, what: str) -> tuple[Pubkey, ...]:
    if count > most:
        raise MalformedAccount(f"{count} {what}, at most {most} fit")
    return tuple(Pubkey.from_bytes(raw[32 * index : 32 * (index + 1)]) for index in range(count))


def _limits(data: memoryview) -> Limits:
    return Limits(**{name: LIMITS.get(data, name) for name in LIMIT_FIELDS})


def _terms(data: memoryview, course: memoryview) -> Terms:
    raw = {name: TERMS.get(data, name) for name, _ in TERMS.fields}
    raw |= {name: COURSE.get(course, name) for name, _ in COURSE.fields if name != "reserved"}
    raw["lookahead"], raw["clip_votes"] = bool(raw["lookahead"]), bool(raw["clip_votes"])
    raw["model_source"] = _text(raw["model_source"], "model_source")
    raw["data_source"] = _text(raw["data_source"], "data_source")
    return Terms(**raw)


def _inclusion(data: memoryview) -> tuple[InclusionSet, ...]:
    kept = []
    for index in range(layout.INCLUSION_RING):
        base = index * INCLUSION.size
        flags = INCLUSION.get(data, "flags", base)
        if flags & layout.INCLUSION_PRESENT:
            members = slots_of(INCLUSION.get(data, "members", base))
            void = bool(flags & layout.INCLUSION_VOID)
            kept.append(InclusionSet(INCLUSION.get(data, "round", base), members, void))
    return tuple(sorted(kept, key=lambda entry: entry.round))


def decode_run(data: bytes) -> Run:
    """Decode a run account (`RUN_SIZE` bytes; more is ignored). Raises MalformedAccount."""
    _check(data, RUN, RUN_SIZE, layout.RUN_MARK)
    view = memoryview(data)

    def part(field: str) -> memoryview:
        start, end = RUN.span(field)
        return view[start:end]

    authority = bytes(part("join_authority"))
    plain = (
        "version",
        "round",
        "epoch",
        "phase_slot",
        "final_rounds",
        "epoch_round",
        "cursor",
        "seed",
        "checkpoint_root",
        "checkpoint_round",
        "member_count",
        "active_count",
        "tokens",
        "revision",
        "created_slot",
        "config_version",
        "model_round",
        "schedule_rounds",
        "reward_rate",
        "reward_earned",
        "reward_paid",
    )
    following = _limits(part("next_limits"))
    return Run(
        owner=Pubkey.from_bytes(bytes(part("owner"))),
        run_id=_text(RUN.get(data, "run_id"), "run id"),
        phase=_phase(RUN.get(data, "phase")),
        inclusion=_inclusion(part("inclusion")),
        limits=_limits(part("limits")),
        terms=_terms(part("terms"), part("course")),
        members_address=Pubkey.from_bytes(bytes(part("members"))),
        rounds_address=Pubkey.from_bytes(bytes(part("rounds"))),
        join_authority=_key_or_none(authority),
        request=_request(RUN.get(data, "request")),
        resume_phase=_phase(RUN.get(data, "resume_phase")),
        next_limits=following if following.batch else None,
        **{name: RUN.get(data, name) for name in plain},
    )


def decode_members(data: bytes) -> tuple[Member, ...]:
    """Decode a members account: the slots in use, in slot order, left and dropped members included. Raises
    MalformedAccount."""
    _check(data, MEMBERS, MEMBERS_SIZE, layout.MEMBERS_MARK)
    table = MEMBERS.offsets["member"]
    plain = (
        "node_key",
        "share",
        "next_share",
        "joined_round",
        "joined_slot",
        "missed",
        "excluded",
        "credit",
        "updates_included",
        "status_slot",
        "reward",
        "reward_claimed",
    )
    members = []
    for slot in range(MAX_MEMBERS):
        base = table + slot * MEMBER.size
        status = MEMBER.get(data, "status", base)
        if status == MemberStatus.EMPTY:
            continue
        if status > MemberStatus.EJECTED:
            raise MalformedAccount(f"member slot {slot} has unknown status {status}; upgrade psyche-node")
        members.append(
            Member(
                slot=slot,
                wallet=Pubkey.from_bytes(MEMBER.get(data, "wallet", base)),
                status=MemberStatus(status),
                ready=bool(MEMBER.get(data, "ready", base)),
                grant=_key_or_none(MEMBER.get(data, "grant", base)),
                **{name: MEMBER.get(data, name, base) for name in plain},
            )
        )
    return tuple(members)


def decode_membership(data: bytes) -> Membership:
    """Decode what a members account holds besides its slots. Raises MalformedAccount."""
    _check(data, MEMBERS, MEMBERS_SIZE, layout.MEMBERS_MARK)
    return Membership(
        banned=_keys(MEMBERS.get(data, "banned"), MEMBERS.get(data, "banned_count"), layout.MAX_BANNED, "banned keys"),
        archived_credit=MEMBERS.get(data, "archived_credit"),
        archived_members=MEMBERS.get(data, "archived_members"),
    )


def decode_grant(data: bytes) -> Grant:
    """Decode a grant account. Raises MalformedAccount."""
    _check(data, GRANT, GRANT_SIZE, layout.GRANT_MARK, layout.RECORD_VERSION)
    return Grant(
        run=Pubkey.from_bytes(GRANT.get(data, "run")),
        authority=Pubkey.from_bytes(GRANT.get(data, "authority")),
        grantee=_key_or_none(GRANT.get(data, "grantee")),
        delegates=_keys(
            GRANT.get(data, "delegate"), GRANT.get(data, "delegate_count"), layout.MAX_DELEGATES, "delegates"
        ),
        created_slot=GRANT.get(data, "created_slot"),
        run_slot=GRANT.get(data, "run_slot"),
    )


def decode_receipt(data: bytes) -> Receipt:
    """Decode a receipt account. Raises MalformedAccount."""
    _check(data, RECEIPT, RECEIPT_SIZE, layout.RECEIPT_MARK, layout.RECORD_VERSION)
    plain = ("credit", "updates_included", "reward", "reward_claimed", "archived_slot", "run_slot")
    return Receipt(
        run=Pubkey.from_bytes(RECEIPT.get(data, "run")),
        wallet=Pubkey.from_bytes(RECEIPT.get(data, "wallet")),
        payer=Pubkey.from_bytes(RECEIPT.get(data, "payer")),
        **{name: RECEIPT.get(data, name) for name in plain},
    )


def decode_round(data: bytes | memoryview, base: int = 0) -> Round | None:
    """Decode one round entry (`ROUND_SIZE` bytes from `base`); None when the entry was never used. Raises
    MalformedAccount."""
    if len(data) < base + ROUND_SIZE:
        raise MalformedAccount(f"round entry has {max(len(data) - base, 0)} bytes, expected {ROUND_SIZE}")
    state = ROUND.get(data, "state", base)
    if state == layout.ROUND_UNUSED:
        return None
    witness_count, range_count = ROUND.get(data, "witness_count", base), ROUND.get(data, "range_count", base)
    if state > layout.ROUND_FINAL or witness_count > layout.MAX_WITNESSES or range_count > layout.MAX_RANGES:
        raise MalformedAccount(f"round entry holds state {state}, {witness_count} witnesses, {range_count} ranges")
    witnesses = ROUND.get(data, "witness", base)[:witness_count]
    active = slots_of(ROUND.get(data, "active", base))
    offsets, counts = ROUND.get(data, "slice_offset", base), ROUND.get(data, "slice_count", base)
    ranges_at, digests_at = base + ROUND.offsets["range"], base + ROUND.offsets["digest"]
    attested, words = ROUND.get(data, "attested", base), ROUND.get(data, "attestation", base)
    length, tokens = ROUND.get(data, "length", base), ROUND.get(data, "tokens", base)
    fingerprint, slot = ROUND.get(data, "fingerprint", base), ROUND.get(data, "commit_slot", base)
    committed = sorted(slots_of(ROUND.get(data, "committed", base)))
    return Round(
        round=ROUND.get(data, "round", base),
        start_slot=ROUND.get(data, "start_slot", base),
        active=active,
        witnesses=witnesses,
        ranges=tuple(
            (RANGE.get(data, "start", at), RANGE.get(data, "count", at))
            for at in range(ranges_at, ranges_at + range_count * RANGE.size, RANGE.size)
        ),
        slices={member: (offsets[member], counts[member]) for member in sorted(active)},
        commitments={
            member: Commitment(
                member=member,
                digest=bytes(data[digests_at + 32 * member : digests_at + 32 * (member + 1)]),
                length=length[member],
                tokens=tokens[member],
                fingerprint=fingerprint[member],
                slot=slot[member],
            )
            for member in committed
        },
        attestations={
            witness: slots_of(words[4 * index : 4 * index + 4])
            for index, witness in enumerate(witnesses)
            if attested >> index & 1
        },
        closed=state >= layout.ROUND_CLOSED,
        final=state == layout.ROUND_FINAL,
        eligible=slots_of(ROUND.get(data, "eligible", base)),
        included=slots_of(ROUND.get(data, "included", base)),
        expected=slots_of(ROUND.get(data, "expected", base)),
        close_slot=ROUND.get(data, "close_slot", base),
        final_slot=ROUND.get(data, "final_slot", base),
    )


def decode_rounds(data: bytes) -> tuple[Round, ...]:
    """Decode a rounds account: the rounds it keeps (at most 4), oldest first. Raises MalformedAccount."""
    _check(data, HEADER, ROUNDS_SIZE, layout.ROUNDS_MARK)
    view = memoryview(data)
    ring = ROUNDS.offsets["ring"]
    entries = (decode_round(view, ring + index * ROUND_SIZE) for index in range(ROUND_RING))
    return tuple(sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.round))


def decode_header(data: bytes) -> Header:
    """Decode the first `HEADER_SIZE` bytes of a rounds account. Raises MalformedAccount."""
    _check(data, HEADER, HEADER_SIZE, layout.ROUNDS_MARK)
    plain = ("due_slot", "round", "members", "active", "ready", "committed", "attested", "requeued", "checkpoint_votes")
    return Header(
        phase=_phase(HEADER.get(data, "phase")),
        draining=bool(HEADER.get(data, "drain")),
        requeue_ranges=HEADER.get(data, "requeue_count"),
        checkpoint_agreed=bool(HEADER.get(data, "checkpoint_agreed")),
        **{name: HEADER.get(data, name) for name in plain},
    )


def decode_requeue(data: bytes) -> tuple[tuple[int, int], ...]:
    """The positions waiting to be drawn again, as (start, count) ranges, first to be drawn first. Raises
    MalformedAccount."""
    _check(data, HEADER, ROUNDS_SIZE, layout.ROUNDS_MARK)
    head, count = HEADER.get(data, "requeue_head"), HEADER.get(data, "requeue_count")
    if head >= layout.MAX_REQUEUE or count > layout.MAX_REQUEUE:
        raise MalformedAccount(f"requeue has head {head} and {count} ranges, at most {layout.MAX_REQUEUE} fit")
    at = [ROUNDS.offsets["requeue"] + (head + index) % layout.MAX_REQUEUE * RANGE.size for index in range(count)]
    return tuple((RANGE.get(data, "start", base), RANGE.get(data, "count", base)) for base in at)
