"""No input makes the program fault: whatever the bytes, accounts and flags, it ends with success or with a number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from program_fuzzing import CASE, SEED, Defect, Fuzzer
from program_harness import Chain, ProgramFault, deploy
from program_host import HostProgram
from program_scenes import SCENES
from solders.instruction import Instruction

from coordinator.errors import ErrorCode
from coordinator.instruction_data import MARKS
from coordinator.toolchain.build import PROGRAM_FOLDER, compile_objects
from coordinator.toolchain.linker import link


@pytest.fixture(scope="module")
def host() -> HostProgram:
    return HostProgram()


@pytest.mark.parametrize(("arch", "executions"), [("v3", 20_000), ("v0", 2_000)])
def test_nothing_faults(arch: str, executions: int, host: HostProgram) -> None:
    """Some cases run on the host's build of the program, too: same answers, same bytes, and nothing written before a
    refusal."""
    fuzzer = Fuzzer(arch)
    for case in range(executions // CASE):
        fuzzer.host = host if case % 4 == 0 else None
        fuzzer.case(case)
    print(f"seed {SEED}; ended: {fuzzer.seen}; succeeded: {fuzzer.succeeded}; compared: {fuzzer.compared}")
    assert sum(fuzzer.seen.values()) == executions
    assert fuzzer.seen["ok"] > executions // 10, fuzzer.seen
    assert fuzzer.compared > executions // 5
    if arch == "v3":
        assert fuzzer.succeeded.keys() == MARKS.keys(), "every instruction also succeeds"
        unseen = {code.name for code in ErrorCode} - fuzzer.seen.keys()
        assert len(unseen) < 10, unseen


def test_the_host_tells_a_difference(tmp_path: Path) -> None:
    sources = tmp_path / "program"
    shutil.copytree(PROGRAM_FOLDER, sources)
    path = sources / "members.c"
    path.write_text(path.read_text(encoding="utf-8").replace("h->members++;", "h->members += 2;"), encoding="utf-8")
    fuzzer = Fuzzer("v3", host=HostProgram(sources))
    case = list(SCENES).index("waiting")
    with pytest.raises(Defect, match=r"(?s)join.* is not as this computer would leave it.*replay: --arch v3 --replay"):
        fuzzer.case(case, executions=400)


def test_the_harness_notices_a_fault(tmp_path: Path) -> None:
    source = "typedef unsigned long long u64; u64 entrypoint(u64 *in) { *(u64 *)(in[2] << 32) = 1; return 5; }"
    (tmp_path / "faulty.c").write_text(source)
    chain = Chain()
    program = deploy(chain, link(compile_objects(tmp_path)), key_seed=60)
    chain.advance()
    with pytest.raises(ProgramFault):
        chain.send(Instruction(program, b"\x09" + bytes(7), []))
