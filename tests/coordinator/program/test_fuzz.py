"""No input makes the program fault: whatever the bytes, accounts and flags, it ends with success or with a number."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from program_harness import Chain, ProgramFault, RunDriver, deploy
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from coordinator import instructions as ix
from coordinator.errors import ErrorCode
from coordinator.toolchain.build import compile_objects
from coordinator.toolchain.linker import link

EXECUTIONS = 2000
EDGES = (0, 1, 2, 3, 255, 256, 2**31, 2**32 - 1)


def plausible(random: random.Random, run: RunDriver) -> Instruction:
    """An instruction as a member would build it, with arguments from near and far."""
    a, p = run.addresses, run.chain.program
    wallet = run.wallet(random.randrange(6))
    number = random.choice([*EDGES, *[run.header.round + delta for delta in (0, 0, 0, -1, -1, 1)]]) % 2**32
    wide = random.choice([*EDGES, 100, 5000, 2**63, 2**64 - 1])
    root = random.choice([run.run.checkpoint_root, bytes(32), random.randbytes(32)])
    build = random.choice(
        [
            lambda: ix.join(a, p, wallet, run.node(random.randrange(6)), random.choice([*EDGES, 1000])),
            lambda: ix.ready(a, p, wallet, root),
            lambda: ix.commit(a, p, wallet, number, root, random.choice([5000, 5000, wide]), wide, wide),
            lambda: ix.attest(a, p, wallet, number, [s for s in range(256) if random.random() < 0.02] + [0]),
            lambda: ix.attest(
                a, p, wallet, number, list(run.rounds[min(run.rounds)].commitments) if run.rounds else []
            ),
            lambda: ix.tick(a, p, wallet),
            lambda: ix.tick(a, p, wallet),
            lambda: ix.checkpoint(a, p, wallet, number, root),
            lambda: ix.leave(a, p, wallet),
            lambda: ix.init_run(p, run.owner, run.run_id, run.limits, run.terms),
        ]
    )
    return build()


def damaged(random: random.Random, instruction: Instruction, keys: list[Pubkey]) -> Instruction:
    """The same with bytes, length, accounts or flags changed."""
    data, metas = bytearray(instruction.data), list(instruction.accounts)
    for _ in range(random.choice((1, 1, 2, 5))):
        kind = random.randrange(7)
        if kind == 0 and data:
            data[random.randrange(len(data))] = random.choice((0, 1, 127, 255, random.randrange(256)))
        elif kind == 1:
            data = data[: random.randrange(len(data) + 1)]
        elif kind == 2:
            data += random.randbytes(random.choice((1, 8, 200)))
        elif kind == 3 and metas:
            metas.pop(random.randrange(len(metas)))
        elif kind == 4:
            meta = AccountMeta(random.choice(keys), random.random() < 0.3, random.random() < 0.7)
            metas.insert(random.randrange(len(metas) + 1), meta)
        elif kind == 5 and metas:
            at = random.randrange(len(metas))
            metas[at] = AccountMeta(metas[at].pubkey, random.random() < 0.5, random.random() < 0.5)
        elif kind == 6:
            random.shuffle(metas)
    return Instruction(instruction.program_id, bytes(data[:600]), metas[:16])


@pytest.mark.parametrize("arch", ["v3", "v0"])
def test_nothing_faults(arch: str) -> None:
    rng = random.Random(20261122)
    chain = Chain(arch)
    seen: Counter[str] = Counter()
    run = RunDriver(chain, "fuzz-0")
    for execution in range(EXECUTIONS // 2):
        if execution % 125 == 0:
            run = RunDriver(
                chain,
                f"fuzz-{execution}",
                init_min_members=3,
                min_members=1,
                total_rounds=6,
                rounds_per_epoch=2,
                overlap=execution // 125 % 2,
                max_round_train_time=20,
                witnesses=1,
                batch=9,
            )
            run.must(run.create())
            if execution % 250 == 0:
                for member in range(4):
                    run.must(run.join(member))
                run.tick_when_due()
                for member in range(4):
                    run.must(run.ready(member))
        instruction = plausible(rng, run)
        if rng.random() < 0.5:
            keys = [run.addresses.run, run.addresses.members, run.addresses.rounds, run.wallet(1), chain.program]
            instruction = damaged(rng, instruction, [*keys, run.owner, Pubkey.from_bytes(rng.randbytes(32))])
        outcome = chain.send(instruction)
        if outcome.code is not None:
            assert outcome.code in ErrorCode._value2member_map_, outcome
        name = "ok" if outcome.ok else ErrorCode(outcome.code).name if outcome.code else "runtime"
        seen[name] += 1
        if rng.random() < 0.2:
            chain.advance(rng.choice((1, 5, 30, 200)))
    assert seen["ok"] > EXECUTIONS // 50, seen
    assert len(seen) > 20, seen
    assert seen["runtime"] < EXECUTIONS // 10, seen


def test_the_harness_notices_a_fault(tmp_path: Path) -> None:
    source = "typedef unsigned long long u64; u64 entrypoint(u64 *in) { *(u64 *)(in[2] << 32) = 1; return 5; }"
    (tmp_path / "faulty.c").write_text(source)
    chain = Chain()
    program = deploy(chain, link(compile_objects(tmp_path)), key_seed=60)
    chain.advance()
    with pytest.raises(ProgramFault):
        chain.send(Instruction(program, b"\x09" + bytes(7), []))
