"""Bytes that must not change by accident: instructions as built, accounts as the program writes and Python reads."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace

import pytest
from program_harness import TERMS
from program_vectors import VECTORS, decoded, instruction_vectors, scenario
from solders.pubkey import Pubkey

from coordinator import layout
from coordinator.addresses import run_addresses
from coordinator.state import (
    MalformedAccount,
    bitmap_words,
    decode_header,
    decode_members,
    decode_round,
    decode_rounds,
    decode_run,
    float_bits,
    slots_of,
)

ACCOUNTS = json.loads((VECTORS / "accounts.json").read_text())


@pytest.fixture(scope="module")
def stored() -> tuple[bytes, bytes, bytes]:
    run, members, rounds = (zlib.decompress(base64.b64decode(part)) for part in ACCOUNTS["accounts"].values())
    return run, members, rounds


def test_instruction_bytes() -> None:
    assert instruction_vectors() == json.loads((VECTORS / "instructions.json").read_text())


def test_commit_is_what_the_protocol_says() -> None:
    """Spelled out once by hand: mark, round, reserved, digest, length, tokens, fingerprint."""
    data = bytes.fromhex(instruction_vectors()["commit"]["data"])
    assert data[:8].hex() == "df8c8ea5e5d09c4a"
    assert data[8:16] == b"\x09\0\0\0" + bytes(4)
    assert data[16:48] == b"\x66" * 32
    assert data[48:] == (123_456_789_012).to_bytes(8, "little") + (34_567).to_bytes(8, "little") + b"\xfe" + b"\xff" * 7


def test_the_program_writes_the_stored_accounts(stored: tuple[bytes, bytes, bytes]) -> None:
    assert scenario().snapshot() == stored


def test_decoders_read_the_stored_accounts(stored: tuple[bytes, bytes, bytes]) -> None:
    assert decoded(*stored) == ACCOUNTS["decoded"]


def test_terms_survive_the_chain(stored: tuple[bytes, bytes, bytes]) -> None:
    run = decode_run(stored[0])
    assert run.terms == TERMS
    assert run.run_id == "vector"


def test_one_round_is_read_from_a_slice(stored: tuple[bytes, bytes, bytes]) -> None:
    for entry in decode_rounds(stored[2]):
        at = layout.round_offset(entry.round)
        assert decode_round(stored[2][at : at + layout.ROUND_SIZE]) == entry


def test_decoders_refuse_what_is_not_theirs(stored: tuple[bytes, bytes, bytes]) -> None:
    run, members, rounds = stored
    for decode, data in ((decode_run, run), (decode_members, members), (decode_rounds, rounds)):
        with pytest.raises(MalformedAccount, match="bytes"):
            decode(data[:-1])
        with pytest.raises(MalformedAccount, match="starts with"):
            decode(b"\0" + data[1:])
        with pytest.raises(MalformedAccount, match="version"):
            decode(data[:8] + b"\x03" + data[9:])
    with pytest.raises(MalformedAccount, match="phase 9"):
        decode_run(run[:12] + b"\x09" + run[13:])
    with pytest.raises(MalformedAccount, match="phase 9"):
        decode_header(rounds[:12] + b"\x09" + rounds[13:256])
    status = layout.MEMBERS.offsets["member"] + layout.MEMBER.offsets["status"]
    with pytest.raises(MalformedAccount, match="status 7"):
        decode_members(members[:status] + b"\x07" + members[status + 1 :])
    ring = layout.ROUNDS.offsets["ring"]
    with pytest.raises(MalformedAccount, match="33 witnesses"):
        decode_rounds(rounds[: ring + 5] + b"\x21" + rounds[ring + 6 :])


def test_addresses_depend_on_everything() -> None:
    program, owner = Pubkey(b"\1" * 32), Pubkey(b"\2" * 32)
    one = run_addresses(program, owner, "run")
    assert len({one.run, one.members, one.rounds}) == 3
    assert one != run_addresses(program, owner, "run2")
    assert one != run_addresses(program, program, "run")
    assert one != run_addresses(owner, owner, "run")


def test_bitmaps_and_floats() -> None:
    slots = {0, 63, 64, 130, 255}
    assert slots_of(bitmap_words(slots)) == slots
    assert float_bits(1.0) == 0x3F800000
    assert float_bits(4e-4) == 0x39D1B717
    assert replace(TERMS, decay_bits=float_bits(0.999)).decay_bits == TERMS.decay_bits == 0x3F7FBE77


def test_positions_follow_the_slices(stored: tuple[bytes, bytes, bytes]) -> None:
    for entry in decode_rounds(stored[2]):
        batch = [p for start, count in entry.ranges for p in range(start, start + count)]
        for slot, (offset, count) in entry.slices.items():
            assert entry.positions(slot) == batch[offset : offset + count]
        assert entry.positions(250) == []
