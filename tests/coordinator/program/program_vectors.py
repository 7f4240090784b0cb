"""Known answers for instructions and accounts: `python program_vectors.py` rewrites the files in tests/vectors/."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from program_harness import LIMITS, TERMS, Chain, RunDriver
from solders.instruction import Instruction
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.addresses import RunAddresses, run_addresses
from coordinator.state import decode_header, decode_members, decode_requeue, decode_rounds, decode_run

VECTORS = Path(__file__).resolve().parent.parent.parent / "vectors"
PROGRAM = Pubkey(b"\x11" * 32)
OWNER = Pubkey(b"\x22" * 32)
WALLET = Pubkey(b"\x33" * 32)
NODE = Pubkey(b"\x44" * 32)


def plain(value: Any) -> Any:
    """JSON's view of a decoded value: bytes as hex, keys as base58, sets sorted, maps with string keys."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Pubkey):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def built_instructions() -> dict[str, Instruction]:
    addresses: RunAddresses = run_addresses(PROGRAM, OWNER, "vector")
    rest = (addresses, PROGRAM, WALLET)
    created = ix.create_run_instructions(PROGRAM, OWNER, "vector", LIMITS, TERMS, lambda size: 1000 + size)
    return {
        **{f"create_{index}": instruction for index, instruction in enumerate(created)},
        "join": ix.join(*rest, NODE, share=777),
        "ready": ix.ready(*rest, b"\x55" * 32),
        "commit": ix.commit(*rest, 9, b"\x66" * 32, 123_456_789_012, 34_567, 2**64 - 2),
        "attest": ix.attest(*rest, 9, [0, 1, 63, 64, 200, 255]),
        "tick": ix.tick(*rest),
        "checkpoint": ix.checkpoint(*rest, 10, b"\x77" * 32),
        "leave": ix.leave(*rest),
    }


def instruction_vectors() -> dict[str, Any]:
    return {
        name: {
            "program": str(instruction.program_id),
            "accounts": [[str(m.pubkey), m.is_signer, m.is_writable] for m in instruction.accounts],
            "data": bytes(instruction.data).hex(),
        }
        for name, instruction in built_instructions().items()
    }


def scenario() -> RunDriver:
    """A run in the middle: one void round, one partial, one member gone, one out of sync, one round open."""
    run = RunDriver(Chain(), "vector", rounds_per_epoch=20, total_rounds=20, overlap=1)
    run.start(6, [1000, 500, 2000, 1000, 1500, 1000])
    run.train(range(6))
    run.attest_all(0, [0, 1], range(6))
    run.chain.advance(60)
    run.tick_when_due()
    run.train(range(6), {5: 99})
    run.tick_when_due()
    run.attest_all(1, range(5), [0, 1, 2])
    run.must(run.leave(4))
    run.must(run.commit(0, tokens=5))
    run.must(run.commit(2, tokens=6))
    run.chain.set_slot(run.header.due_slot)
    run.tick_when_due()
    run.chain.set_slot(max(run.chain.slot, run.header.due_slot))
    run.tick_when_due()
    run.must(run.commit(1, tokens=3))
    return run


def decoded(run: bytes, members: bytes, rounds: bytes) -> dict[str, Any]:
    return {
        "run": plain(asdict(decode_run(run))),
        "members": plain([asdict(member) for member in decode_members(members)]),
        "header": plain(asdict(decode_header(rounds[:256]))),
        "rounds": plain([asdict(entry) for entry in decode_rounds(rounds)]),
        "requeue": plain(decode_requeue(rounds)),
    }


def account_vectors() -> dict[str, Any]:
    data = scenario().snapshot()
    packed = [base64.b64encode(zlib.compress(part, 9)).decode() for part in data]
    return {"accounts": dict(zip(("run", "members", "rounds"), packed, strict=True)), "decoded": decoded(*data)}


def main() -> None:
    for name, content in (("instructions", instruction_vectors()), ("accounts", account_vectors())):
        (VECTORS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
