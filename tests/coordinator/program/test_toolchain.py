"""The build is reproducible wherever the tree lies, the linker refuses what the machine would get wrong, and the real
loader accepts both of its outputs."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from program_harness import Chain, RunDriver, deploy
from solders.instruction import Instruction

from coordinator.program import DamagedProgram, program_bytes
from coordinator.toolchain import build as builder
from coordinator.toolchain.build import PROGRAM, PROGRAM_FOLDER, BuildError, build, compile_objects, recorded_hash
from coordinator.toolchain.elf import LinkError, read_object
from coordinator.toolchain.linker import link
from coordinator.toolchain.syscalls import SYSCALLS, murmur3_32

V3_TEXT = 1 << 32


def test_rebuild_gives_the_checked_in_bytes(tmp_path: Path) -> None:
    elsewhere = tmp_path / "another place" / "program"
    shutil.copytree(PROGRAM_FOLDER, elsewhere)
    rebuilt = build("v3", elsewhere)
    assert rebuilt == PROGRAM.read_bytes(), "run `make program` and commit coordinator.so"
    assert hashlib.sha256(rebuilt).hexdigest() == recorded_hash()
    assert str(tmp_path).encode() not in rebuilt


def test_check_finds_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builder.main(["--check"]) == 0
    copy = tmp_path / "coordinator.so"
    copy.write_bytes(PROGRAM.read_bytes()[:-8] + bytes(8))
    shutil.copy(f"{PROGRAM}.sha256", f"{copy}.sha256")
    monkeypatch.setattr(builder, "PROGRAM", copy)
    assert builder.main(["--check"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_the_packaged_program_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program_bytes() == PROGRAM.read_bytes()
    shutil.copy(f"{PROGRAM}.sha256", tmp_path)
    (tmp_path / "coordinator.so").write_bytes(PROGRAM.read_bytes() + b"\0")
    monkeypatch.setattr("coordinator.program.files", lambda _: tmp_path)
    with pytest.raises(DamagedProgram, match="make program"):
        program_bytes()


def test_v3_file_is_what_the_strict_parser_wants() -> None:
    raw = PROGRAM.read_bytes()
    elf = ELFFile(io.BytesIO(raw))
    header = elf.header
    assert (header.e_machine, header.e_flags, header.e_shnum) == ("EM_BPF", 3, 0)
    rodata, text = elf.iter_segments()
    assert (rodata["p_flags"], rodata["p_vaddr"], rodata["p_offset"]) == (4, 0, 176)
    assert (text["p_flags"], text["p_vaddr"]) == (1, V3_TEXT)
    assert text["p_offset"] == 176 + rodata["p_filesz"]
    assert text["p_offset"] + text["p_filesz"] == len(raw)
    assert V3_TEXT <= header.e_entry < V3_TEXT + text["p_filesz"]
    # system calls are numbered in the file; every one must be on the allow-list
    numbers = {murmur3_32(name.encode()) for name in SYSCALLS}
    code = text.data()
    calls = [struct.unpack_from("<BBhI", code, at) for at in range(0, len(code), 8)]
    syscalls = {imm for opcode, registers, _, imm in calls if opcode == 0x85 and registers >> 4 == 0}
    assert syscalls
    assert syscalls <= numbers


@pytest.mark.parametrize(("arch", "all_features"), [("v3", False), ("v0", False), ("v3", True)])
def test_the_loader_deploys_it_and_it_runs(arch: str, all_features: bool) -> None:
    run = RunDriver(Chain(arch, all_features=all_features))
    run.start()
    run.train(range(4))
    assert run.rounds[0].closed


def test_murmur3() -> None:
    assert murmur3_32(b"sol_log_") == 0x207559BD
    assert murmur3_32(b"sol_sha256") == 0x11F49D86
    assert murmur3_32(b"sol_invoke_signed_c") == 0xA22B9C85
    assert murmur3_32(b"", 1) == 0x514E28B7


def compiled(folder: Path, sources: dict[str, str]) -> list[tuple[str, bytes]]:
    prelude = "typedef unsigned long long u64; typedef unsigned u32; typedef unsigned char u8;\n"
    for name, body in sources.items():
        (folder / name).write_text(prelude + body)
    return compile_objects(folder)


ENTRY = "u64 entrypoint(const u8 *in)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"u64 seen; {ENTRY} {{ return seen += *in; }}", "writable data"),
        (f"u64 seen = 5; {ENTRY} {{ return seen += *in; }}", "writable data"),
        (f"u64 nowhere(u64); {ENTRY} {{ return nowhere(*in); }}", "nowhere is neither defined nor a system call"),
        (
            f"u64 sol_remaining_compute_units(void); {ENTRY} {{ return *in + sol_remaining_compute_units(); }}",
            "mainnet",
        ),
        ("u64 main(const u8 *in) { return *in; }", "no object defines the function 'entrypoint'"),
        (f"extern const u64 table[]; {ENTRY} {{ return table[*in]; }}", "table is not defined"),
        (f"{ENTRY} {{ return ((unsigned __int128)*(u64 *)in * *(u64 *)(in + 8)) >> 64; }}", "__multi3"),
        (f"{ENTRY} {{ __sync_fetch_and_add((u64 *)in, 1); return 0; }}", "atomic"),
    ],
)
def test_linker_refuses(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises((LinkError, BuildError), match=message):
        link(compiled(tmp_path, {"bad.c": body}))


def test_linker_refuses_a_name_defined_twice(tmp_path: Path) -> None:
    body = "u64 twice(void) { return 1; }"
    objects = compiled(tmp_path, {"a.c": body, "b.c": body, "c.c": f"{ENTRY} {{ return *in; }}"})
    with pytest.raises(LinkError, match="twice is defined twice"):
        link(objects)


@pytest.mark.parametrize("arch", ["v3", "v0"])
def test_linker_refuses_32_bit_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    monkeypatch.setattr(builder, "FLAGS", tuple("-mcpu=v3" if f == "-mcpu=v2" else f for f in builder.FLAGS))
    add = compiled(tmp_path, {"bad.c": f"{ENTRY} {{ u32 a = *(u32 *)in, b = *(u32 *)(in + 4); return a * b + 1; }}"})
    with pytest.raises(LinkError, match="32-bit arithmetic"):
        link(add, arch)
    jump = compiled(
        tmp_path, {"bad.c": f"{ENTRY} {{ u32 a = *(u32 *)in; if (a < 9) return *(u64 *)(in + 8); return 5; }}"}
    )
    with pytest.raises(LinkError, match=r"32-bit (jump|arithmetic)"):
        link(jump, arch)


def test_linker_refuses_damaged_objects() -> None:
    (name, raw), *_ = compile_objects()
    for damaged in (b"", raw[:40], b"\x7fELF\x01\x01" + raw[6:], raw[:18] + b"\x3e\0" + raw[20:], raw[: len(raw) // 2]):
        with pytest.raises(LinkError):
            read_object(name, damaged)


def test_linked_code_computes_what_c_means(tmp_path: Path) -> None:
    """Const tables with pointers, function pointers, calls between objects, a shift loop: run, not just accepted."""
    sources = {
        "table.c": """
            static u64 twice(u64 x) { return 2 * x; }
            static u64 square(u64 x) { return x * x; }
            typedef u64 (*function)(u64);
            const function functions[] = {twice, square};
            static const char *const names[] = {"ab", "cde"};
            u64 letter(u64 i) { return (u8)names[i & 1][i >> 1]; }
        """,
        "main.c": """
            typedef u64 (*function)(u64);
            extern const function functions[];
            u64 letter(u64);
            u64 entrypoint(const u8 *in) {
                u64 n = in[8 + 8];
                u32 wrap = 0xfffffff0u + (u32)n;
                u64 total = functions[n & 1](n) * 1000 + letter(n & 3) + (wrap >> 28);
                return total;
            }
        """,
    }
    objects = compiled(tmp_path, sources)

    def expected(n: int) -> int:
        letters = ("ab", "cde")[n & 1]
        value = (n * n if n & 1 else 2 * n) * 1000 + ord(letters[(n & 3) >> 1])
        return value + ((0xFFFFFFF0 + n & 0xFFFFFFFF) >> 28)

    for arch in ("v3", "v0"):
        chain = Chain()
        chain.payer = chain.payer.__class__.from_seed(b"\x21" * 32)
        chain.svm.airdrop(chain.payer.pubkey(), 10**12)
        program = deploy(chain, link(objects, arch), key_seed=0x31)
        chain.advance()
        for n in (0, 1, 2, 3, 6, 17, 200):
            # no accounts: the count is 0, then the data's length, then the data
            outcome = chain.send(Instruction(program, bytes([n]), []))
            assert outcome.code == expected(n), (arch, n)


def test_command_line_builds_to_a_given_place(tmp_path: Path) -> None:
    output = tmp_path / "out.so"
    command = [sys.executable, "-m", "coordinator.toolchain.build", "--arch", "v0", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert output.read_bytes() == build("v0")
    assert Path(f"{output}.sha256").read_text().split()[0] == hashlib.sha256(output.read_bytes()).hexdigest()
