"""No input makes the program fault: whatever the bytes, accounts and flags, it ends with success or with a number."""

from __future__ import annotations

from pathlib import Path

import pytest
from program_fuzzing import CASE, SEED, Fuzzer
from program_harness import Chain, ProgramFault, deploy
from solders.instruction import Instruction

from coordinator import instructions as ix
from coordinator.errors import ErrorCode
from coordinator.toolchain.build import compile_objects
from coordinator.toolchain.linker import link


@pytest.mark.parametrize(("arch", "executions"), [("v3", 20_000), ("v0", 4_000)])
def test_nothing_faults(arch: str, executions: int) -> None:
    fuzzer = Fuzzer(arch)
    for case in range(executions // CASE):
        fuzzer.case(case)
    print(f"seed {SEED}; ended: {fuzzer.seen}; succeeded: {fuzzer.succeeded}")
    assert sum(fuzzer.seen.values()) == executions
    assert fuzzer.seen["ok"] > executions // 20, fuzzer.seen
    assert fuzzer.succeeded.keys() == ix.MARKS.keys(), "every instruction also succeeds"
    if arch == "v3":
        unseen = {code.name for code in ErrorCode} - fuzzer.seen.keys()
        assert len(unseen) < 10, unseen


def test_the_harness_notices_a_fault(tmp_path: Path) -> None:
    source = "typedef unsigned long long u64; u64 entrypoint(u64 *in) { *(u64 *)(in[2] << 32) = 1; return 5; }"
    (tmp_path / "faulty.c").write_text(source)
    chain = Chain()
    program = deploy(chain, link(compile_objects(tmp_path)), key_seed=60)
    chain.advance()
    with pytest.raises(ProgramFault):
        chain.send(Instruction(program, b"\x09" + bytes(7), []))
