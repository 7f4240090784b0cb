"""The IDL files are current, and describe the bytes that the project itself writes."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from runs import LIMITS, TERMS
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator import idl, layout
from coordinator import instructions as ix
from coordinator.addresses import run_addresses
from coordinator.errors import ErrorCode
from coordinator.events import EVENTS
from coordinator.instruction_data import INSTRUCTIONS
from coordinator.layout import Record

OWNER, PROGRAM = Keypair().pubkey(), Keypair().pubkey()
AT = run_addresses(PROGRAM, OWNER, "described")
KEY, NODE, EXTRA = (Keypair().pubkey() for _ in range(3))


def rent(size: int) -> int:
    return size


# Every instruction as the project builds it, and the accounts behind the run's.
BUILT: dict[str, Instruction] = {
    "init_run": ix.init_run(PROGRAM, OWNER, "described", LIMITS, TERMS, KEY),
    "migrate": ix.migrate(AT, PROGRAM, OWNER),
    "set_config": ix.set_config(AT, PROGRAM, OWNER, LIMITS, KEY),
    "set_model": ix.set_model(AT, PROGRAM, OWNER, TERMS),
    "pause": ix.pause(AT, PROGRAM, OWNER),
    "resume": ix.resume(AT, PROGRAM, OWNER),
    "finish": ix.finish(AT, PROGRAM, OWNER),
    "close_run": ix.close_run(AT, PROGRAM, OWNER),
    "kick": ix.kick(AT, PROGRAM, OWNER, KEY),
    "ban": ix.ban(AT, PROGRAM, OWNER, KEY, lift=True),
    "set_reward_rate": ix.set_reward_rate(AT, PROGRAM, OWNER, 7),
    "authorize": ix.authorize(AT, PROGRAM, OWNER, KEY, rent)[-1],
    "revoke": ix.revoke(AT, PROGRAM, OWNER, EXTRA, eject=True),
    "delegate": ix.delegate(AT, PROGRAM, OWNER, EXTRA, KEY, remove=True),
    "join": ix.join(AT, PROGRAM, OWNER, NODE, 9, EXTRA),
    "ready": ix.ready(AT, PROGRAM, OWNER, bytes(range(32))),
    "set_share": ix.set_share(AT, PROGRAM, OWNER, 11),
    "commit": ix.commit(AT, PROGRAM, OWNER, 3, bytes(range(32)), 4, 5, 6),
    "attest": ix.attest(AT, PROGRAM, OWNER, 3, [0, 64, 255]),
    "checkpoint": ix.checkpoint(AT, PROGRAM, OWNER, 3, bytes(range(32))),
    "leave": ix.leave(AT, PROGRAM, OWNER),
    "archive": ix.archive(AT, PROGRAM, OWNER, 5, KEY, 99, rent)[-1],
    "restore": ix.restore(AT, PROGRAM, OWNER, EXTRA, KEY),
    "reclaim": ix.reclaim(AT.run, PROGRAM, OWNER, EXTRA),
    "claim": ix.claim(AT, PROGRAM, OWNER, EXTRA),
    "tick": ix.tick(AT, PROGRAM, OWNER),
}
FIRST_ARGUMENTS: dict[str, bytes] = {
    "init_run": b"described".ljust(32, b"\0"),
    "set_config": struct.pack("<I", LIMITS.init_min_members),
    "set_model": TERMS.model_root,
    "kick": bytes(KEY),
    "ban": bytes(KEY) + struct.pack("<II", 1, 0),
    "set_reward_rate": struct.pack("<Q", 7),
    "authorize": bytes(KEY),
    "revoke": struct.pack("<II", 1, 0),
    "delegate": bytes(KEY) + struct.pack("<II", 1, 0),
    "join": struct.pack("<II", 9, 0),
    "ready": bytes(range(32)),
    "set_share": struct.pack("<II", 11, 0),
    "commit": struct.pack("<II32sQQQ", 3, 0, bytes(range(32)), 4, 5, 6),
    "attest": struct.pack("<II4Q", 3, 0, 1, 1, 0, 1 << 63),
    "checkpoint": struct.pack("<II", 3, 0) + bytes(range(32)),
    "archive": struct.pack("<II", 5, 0),
}


def test_the_files_are_current() -> None:
    for name, text in idl.texts().items():
        assert (idl.FOLDER / name).read_text(encoding="utf-8") == text, "run: python -m coordinator.idl"
    assert idl.main(["--check"]) == 0


def size_of(kind: Any, types: dict[str, int]) -> int:
    if isinstance(kind, str):
        return {"u8": 1, "u32": 4, "u64": 8, "pubkey": 32, "publicKey": 32}[kind]
    if "array" in kind:
        return size_of(kind["array"][0], types) * int(kind["array"][1])
    name = kind["defined"]
    return types[name["name"] if isinstance(name, dict) else name]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_are_those_that_are_built(name: str) -> None:
    built, call = BUILT[name], idl.CALLS[name]
    described = next(one for one in idl.modern()["instructions"] if one["name"] == name)
    assert bytes(described["discriminator"]) == built.data[:8]
    sizes = {part: record.size for part, record in idl._PARTS.items()}
    assert sum(size_of(one["type"], sizes) for one in described["args"]) == len(built.data) - 8
    assert built.data[8:].startswith(FIRST_ARGUMENTS.get(name, b""))
    assert bool(call.args) == (name in FIRST_ARGUMENTS)
    flags = [(one.get("signer", False), one.get("writable", False)) for one in described["accounts"]]
    assert flags == [(meta.is_signer, meta.is_writable) for meta in built.accounts]
    keys = {"run": AT.run, "members": AT.members, "rounds": AT.rounds, "node_key": NODE}
    named = {one["name"]: meta.pubkey for one, meta in zip(described["accounts"], built.accounts, strict=True)}
    assert all(named[part] == key for part, key in keys.items() if part in named)


def test_types_have_the_size_of_the_records() -> None:
    records: dict[str, Record] = {**idl._PARTS, **idl._ACCOUNTS, **EVENTS}
    for shape in (idl.modern(), idl.legacy()):
        listed = [one for part in ("types", "accounts", "events") for one in shape[part]]
        structs = {one["name"]: one.get("type", one)["fields"] for one in listed if "type" in one or "fields" in one}
        sizes = {part: record.size for part, record in records.items()}
        for name, record in records.items():
            mark = 8 if record.fields[0][0] in ("mark", "discriminator") else 0
            assert sum(size_of(one["type"], sizes) for one in structs[name]) == record.size - mark, name
    assert layout.HEADER.fields[0][0] == "discriminator", "the rounds account begins with its header's mark"


def test_errors_and_marks_are_complete() -> None:
    for shape in (idl.modern(), idl.legacy()):
        assert [one["code"] for one in shape["errors"]] == [int(code) for code in ErrorCode]
        assert all(one["msg"] for one in shape["errors"])
        assert [one["name"] for one in shape["events"]] == list(EVENTS)
    assert set(idl.CALLS) == set(INSTRUCTIONS)
    marks = {one["name"]: bytes(one["discriminator"]) for one in idl.modern()["accounts"]}
    assert marks["Run"] == layout.RUN_MARK
    assert marks["Receipt"] == layout.RECEIPT_MARK
    assert idl.modern(str(Pubkey.default()))["address"] == str(Pubkey.default())
