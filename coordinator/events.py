"""The program's events: the Python side of `program/events.h`, and how to read them out of a transaction's logs.

An event is logged as base64 of Anchor's 8-byte mark followed by fixed-size little-endian fields. A test parses
`events.h` and compares field by field.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from solders.pubkey import Pubkey

from coordinator.layout import MAX_MEMBERS, MAX_RANGES, RANGE, Record, discriminator
from coordinator.values import slots_of

_HEAD: Final = [("mark", "8s"), ("run", "32s")]
_BITMAP: Final = "4Q"


def _event(name: str, *fields: tuple[str, str]) -> Record:
    return Record(name, [*_HEAD, *fields])


_MEMBER: Final = (("round", "I"), ("member", "I"))
_MEMBERS: Final = (*_MEMBER, ("members", _BITMAP))
_CREDIT: Final = (("wallet", "32s"), ("receipt", "32s"), ("credit", "Q"), ("member", "I"), ("pad", "I"))
_CONFIG: Final = (("round", "I"), ("config_version", "I"))

EVENTS: Final = {
    record.name: record
    for record in (
        _event("RunCreated", ("owner", "32s"), ("run_id", "32s")),
        _event("RunClosed", ("owner", "32s"), ("tokens", "Q")),
        _event("ConfigRequested", *_CONFIG),
        _event("ConfigChanged", *_CONFIG),
        _event(
            "ModelChanged", ("round", "I"), ("config_version", "I"), ("model_root", "32s"), ("data_manifest", "32s")
        ),
        _event("MemberJoined", ("wallet", "32s"), ("node_key", "32s"), ("member", "I"), ("share", "I")),
        _event("MemberReady", *_MEMBER),
        _event("MemberLeft", *_MEMBER),
        _event("MemberArchived", *_CREDIT),
        _event("MemberRestored", *_CREDIT),
        _event("Authorized", ("grantee", "32s")),
        _event("Revoked", ("grantee", "32s")),
        _event("Committed", *_MEMBER, ("digest", "32s"), ("length", "Q"), ("tokens", "Q"), ("fingerprint", "Q")),
        _event("Attested", *_MEMBERS),
        _event("PhaseChanged", ("slot", "Q"), ("phase", "I"), ("round", "I"), ("epoch", "I"), ("pad", "I")),
        _event(
            "RoundStarted",
            ("round", "I"),
            ("first_slot", "I"),
            ("positions", "Q"),
            ("active", _BITMAP),
            ("range", f"{MAX_RANGES * RANGE.size}s"),
            ("slice_count", f"{MAX_MEMBERS}I"),
        ),
        _event("RoundFinal", ("round", "I"), ("is_void", "I"), ("tokens", "Q"), ("members", _BITMAP)),
        _event("MembersDropped", *_MEMBERS),
        _event("MembersDesynced", *_MEMBERS),
        _event("MembersEjected", *_MEMBERS),
        _event("CheckpointAgreed", ("round", "I"), ("votes", "I"), ("root", "32s")),
        _event("RewardPaid", ("wallet", "32s"), ("lamports", "Q")),
    )
}
_BY_MARK: Final = {discriminator("event", name): record for name, record in EVENTS.items()}
_ADDRESSES: Final = frozenset({"run", "owner", "wallet", "grantee", "receipt"})
_HIDDEN: Final = frozenset({"mark", "pad", "run"})
_PREFIX: Final = "Program data: "


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a run. `fields` are plain values, as they go into JSON: addresses in base58, other keys and digests
    in hex, bitmaps as lists of member slots, ranges as [start, count] pairs, `slices` as {slot: count}."""

    name: str
    run: Pubkey
    fields: dict[str, Any]


def decode_event(data: bytes) -> Event | None:
    """The event in these bytes; None for what is none of this program's, or of a version that this one does not
    know."""
    record = _BY_MARK.get(data[:8])
    if record is None or len(data) != record.size:
        return None
    fields: dict[str, Any] = {}
    for name, code in record.fields:
        if name not in _HIDDEN:
            fields.update(_plain(name, code, record.get(data, name)))
    return Event(record.name, Pubkey.from_bytes(record.get(data, "run")), fields)


def _plain(name: str, code: str, value: Any) -> dict[str, Any]:
    if name in _ADDRESSES:
        return {name: str(Pubkey.from_bytes(value))}
    if name == "run_id":
        return {name: value.rstrip(b"\0").decode("utf-8", "replace")}
    if name == "range":
        pairs = [
            [RANGE.get(value, "start", base), RANGE.get(value, "count", base)]
            for base in range(0, len(value), RANGE.size)
        ]
        return {"ranges": [pair for pair in pairs if pair[1]]}
    if name == "slice_count":
        return {"slices": {str(slot): count for slot, count in enumerate(value) if count}}
    if name == "fingerprint":
        return {name: f"{value:016x}"}
    if code == _BITMAP:
        return {name: sorted(slots_of(value))}
    return {name: value.hex() if isinstance(value, bytes) else value}


def events_in(logs: Iterable[str], program: Pubkey) -> Iterator[Event]:
    """The events that `program` logged in one transaction, in order.

    Only lines that the program itself wrote count: what another program logs, before, behind or inside, does not.
    """
    running: list[str] = []
    own = str(program)
    for line in logs:
        words = line.split(" ", 3)
        if len(words) >= 3 and words[0] == "Program" and words[2] == "invoke":
            running.append(words[1])
        elif len(words) >= 3 and words[0] == "Program" and words[2] in ("success", "failed:"):
            if running:
                running.pop()
        elif line.startswith(_PREFIX) and running and running[-1] == own:
            try:
                data = base64.b64decode(line[len(_PREFIX) :].split(" ", 1)[0], validate=True)
            except (binascii.Error, ValueError):
                continue
            event = decode_event(data)
            if event is not None:
                yield event
