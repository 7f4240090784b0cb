"""Compiled code computes on the virtual machine what C means; and this check sees it when it does not."""

from __future__ import annotations

import pytest
from arithmetic_check import NAMES, Host, Machine, compare

from coordinator.toolchain import build, linker

INPUTS = 16_384


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.mark.parametrize("arch", ["v3", "v0"])
def test_arithmetic_is_the_hosts(host: Host, arch: linker.Arch) -> None:
    wrong = compare(Machine(arch), host, INPUTS)
    assert not wrong, "\n".join(map(str, wrong))


def test_without_the_linkers_check_32_bit_code_is_found_wrong(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """-mcpu=v3 and a linker that lets everything pass: the machine extends the sign where LLVM counts on zeros."""
    flags = tuple("-mcpu=v3" if flag == "-mcpu=v2" else flag for flag in build.FLAGS)
    monkeypatch.setattr(build, "FLAGS", flags)
    with pytest.raises(linker.LinkError, match="32-bit"):
        Machine()
    monkeypatch.setattr(linker, "_check_instructions", lambda text, arch: None)
    wrong = {found.operation for found in compare(Machine(), host, 256)}
    assert {"add_u32", "subtract_u32", "multiply_u32"} <= wrong
    assert len(wrong) < len(NAMES) // 2, "the rest of the comparison stands"
