"""Links clang's BPF objects into a program that Solana's loader accepts. Standard library only.

lld does not know Solana's flavour of BPF. What is needed is small: lay out text and read-only data, resolve three kinds
of relocation, refuse what the virtual machine would run differently or not at all, and write the file in SBPF version 3
(strict layout, no relocations) or version 0 (a shared object with one relocation per system call).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from coordinator.toolchain.elf import (
    SHF_ALLOC,
    SHF_EXEC,
    SHF_WRITE,
    SHN_ABS,
    SHN_COMMON,
    LinkError,
    ObjectFile,
    read_object,
)
from coordinator.toolchain.syscalls import SYSCALLS, murmur3_32

__all__ = ["Arch", "LinkError", "link"]

Arch = Literal["v0", "v3"]

R_BPF_64_64: Final = 1
R_BPF_64_ABS64: Final = 2
R_BPF_64_32: Final = 10
V3_TEXT: Final = 1 << 32
OP_CALL: Final = 0x85
OP_CALLX: Final = 0x8D
OP_LDDW: Final = 0x18
BYTE_SWAPS: Final = (0xD4, 0xDC)
ATOMICS: Final = (0xC3, 0xDB)
RODATA_PREFIX: Final = bytes(8)  # nothing may live at address 0 in version 3


@dataclass(frozen=True, slots=True)
class _Place:
    """A position in the output: in text or in read-only data."""

    area: Literal["text", "rodata"]
    offset: int


class _Image:
    """Text and read-only data of all objects, with every symbol's place."""

    def __init__(self, objects: Sequence[ObjectFile]) -> None:
        self.objects = objects
        self.text = bytearray()
        self.rodata = bytearray(RODATA_PREFIX)
        self.places: dict[tuple[int, int], _Place] = {}
        self.globals: dict[str, _Place] = {}
        for number, source in enumerate(objects):
            self._lay_out(number, source)
        for number, source in enumerate(objects):
            self._collect_globals(number, source)
        for area in (self.text, self.rodata):
            area.extend(bytes(-len(area) % 8))
        if len(self.rodata) == len(RODATA_PREFIX):
            self.rodata.clear()

    def _lay_out(self, number: int, source: ObjectFile) -> None:
        for index, section in enumerate(source.sections):
            if not section.flags & SHF_ALLOC or section.size == 0 or section.name == ".eh_frame":
                continue
            executable = bool(section.flags & SHF_EXEC)
            if not executable and section.flags & SHF_WRITE and not section.name.startswith(".data.rel.ro"):
                raise LinkError(
                    f"{source.name}: {section.name} holds {section.size} bytes of writable data; a program has none,"
                    " make the variable const or local"
                )
            if len(section.data) != section.size:
                raise LinkError(f"{source.name}: {section.name} has no bytes in the file")
            if executable and section.size % 8:
                raise LinkError(f"{source.name}: {section.name} is not a whole number of instructions")
            area = self.text if executable else self.rodata
            area.extend(bytes(-len(area) % max(section.align, 8)))
            self.places[number, index] = _Place("text" if executable else "rodata", len(area))
            area.extend(section.data)

    def _collect_globals(self, number: int, source: ObjectFile) -> None:
        for symbol in source.symbols:
            if symbol.bind == 0 or symbol.section == 0:
                continue
            if symbol.section == SHN_COMMON:
                raise LinkError(f"{source.name}: {symbol.name} is a writable common symbol; make it const or local")
            place = self.places.get((number, symbol.section))
            if place is None:
                continue
            if symbol.name in self.globals:
                raise LinkError(f"{source.name}: {symbol.name} is defined twice")
            self.globals[symbol.name] = _Place(place.area, place.offset + symbol.value)

    def resolve(self, number: int, symbol_index: int) -> _Place | str:
        """Where a symbol is, or its name when no object defines it."""
        source = self.objects[number]
        if symbol_index >= len(source.symbols):
            raise LinkError(f"{source.name}: a relocation names symbol {symbol_index}, there are {len(source.symbols)}")
        symbol = source.symbols[symbol_index]
        if symbol.section == SHN_ABS:
            raise LinkError(f"{source.name}: {symbol.name} is absolute, which has no place in a program")
        if symbol.section == 0:
            return self.globals.get(symbol.name, symbol.name)
        place = self.places.get((number, symbol.section))
        if place is None:
            section = source.sections[symbol.section].name
            raise LinkError(
                f"{source.name}: {symbol.name or section} is in {section}, which is not part of the program"
            )
        return _Place(place.area, place.offset + symbol.value)


def _relocate(image: _Image, text_base: int, rodata_base: int) -> list[tuple[int, str]]:
    """Resolve every relocation in place. Returns the system calls as (offset in text, name)."""
    bases = {"text": text_base, "rodata": rodata_base}
    calls: list[tuple[int, str]] = []
    for number, source in enumerate(image.objects):
        for section_index, relocations in source.relocations.items():
            place = image.places.get((number, section_index))
            if place is None:
                continue
            area = image.text if place.area == "text" else image.rodata
            for relocation in relocations:
                at = place.offset + relocation.offset
                target = image.resolve(number, relocation.symbol)
                if relocation.kind == R_BPF_64_32:
                    _relocate_call(image, source, at, target, calls)
                    continue
                if isinstance(target, str):
                    raise LinkError(f"{source.name}: {target} is not defined in any object")
                address = bases[target.area] + target.offset
                if relocation.kind == R_BPF_64_64:
                    addend = struct.unpack_from("<I", area, at + 4)[0]
                    area[at + 1] &= 0x0F
                    struct.pack_into("<I", area, at + 4, (address + addend) & 0xFFFFFFFF)
                    struct.pack_into("<I", area, at + 12, (address + addend) >> 32)
                elif relocation.kind == R_BPF_64_ABS64:
                    addend = struct.unpack_from("<Q", area, at)[0]
                    struct.pack_into("<Q", area, at, address + addend)
                else:
                    raise LinkError(f"{source.name}: relocation kind {relocation.kind} is not supported")
    return calls


def _relocate_call(
    image: _Image, source: ObjectFile, at: int, target: _Place | str, calls: list[tuple[int, str]]
) -> None:
    if isinstance(target, str):
        if target not in SYSCALLS:
            raise LinkError(
                f"{source.name}: {target} is neither defined nor a system call of mainnet; a compiler helper"
                " (memcpy, __multi3, ...) means that the code does something the machine has no instruction for"
            )
        calls.append((at, target))
        return
    if target.area != "text":
        raise LinkError(f"{source.name}: a call leads into read-only data")
    addend = struct.unpack_from("<i", image.text, at + 4)[0]
    destination = target.offset + (addend + 1) * 8
    image.text[at + 1] = image.text[at + 1] & 0x0F | 0x10
    struct.pack_into("<i", image.text, at + 4, (destination - at) // 8 - 1)


def _check_instructions(text: bytearray, arch: Arch) -> None:
    """Refuse what SBPF executes differently from LLVM's intent; move callx's register for version 0."""
    at = 0
    while at < len(text):
        opcode = text[at]
        kind = opcode & 7
        if kind == 4 and opcode not in BYTE_SWAPS:
            raise LinkError(f"text+{at:#x}: 32-bit arithmetic ({opcode:#04x}); compile with -mcpu=v2")
        if kind == 6:
            raise LinkError(f"text+{at:#x}: 32-bit jump ({opcode:#04x}); compile with -mcpu=v2")
        if opcode in ATOMICS:
            raise LinkError(f"text+{at:#x}: atomic instruction ({opcode:#04x}); programs run alone, use plain code")
        if opcode == OP_CALLX and arch == "v0":
            struct.pack_into("<I", text, at + 4, text[at + 1] & 0x0F)
            text[at + 1] = 0
        at += 16 if opcode == OP_LDDW else 8


def _header(kind: int, entry: int, flags: int, phnum: int, shoff: int, shnum: int) -> bytes:
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    phoff = 64 if phnum else 0
    names = shnum - 1 if shnum else 0
    return ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, 247, 1, entry, phoff, shoff, flags, 64, 56, phnum, 64, shnum, names
    )


def _write_v3(image: _Image, entry: _Place) -> bytes:
    calls = _relocate(image, V3_TEXT, 0)
    for at, name in calls:
        struct.pack_into("<BxhI", image.text, at, OP_CALL, 0, murmur3_32(name.encode()))
        image.text[at + 1] = 0
    _check_instructions(image.text, "v3")
    segments = [(4, 0, image.rodata)] if image.rodata else []
    segments.append((1, V3_TEXT, image.text))
    offset = 64 + 56 * len(segments)
    out = bytearray(_header(3, V3_TEXT + entry.offset, 3, len(segments), 0, 0))
    for flags, address, data in segments:
        out += struct.pack("<IIQQQQQQ", 1, flags, offset, address, address, len(data), len(data), 8)
        offset += len(data)
    for _, _, data in segments:
        out += data
    return bytes(out)


def _string_table(names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    table, offsets = b"\0", {"": 0}
    for name in names:
        offsets[name] = len(table)
        table += name.encode() + b"\0"
    return table, offsets


def _write_v0(image: _Image, entry: _Place) -> bytes:
    text_at = 64 + 3 * 56
    rodata_at = text_at + len(image.text)
    dynamic_at = rodata_at + len(image.rodata)
    calls = _relocate(image, V3_TEXT + text_at, V3_TEXT + rodata_at)
    for at, _ in calls:
        struct.pack_into("<BBhi", image.text, at, OP_CALL, 0x10, 0, -1)
    _check_instructions(image.text, "v0")

    names = sorted({name for _, name in calls})
    dynstr, name_at = _string_table(names)
    dynstr += bytes(-len(dynstr) % 8)
    dynsym = bytes(24) + b"".join(struct.pack("<IBBHQQ", name_at[name], 0x10, 0, 0, 0, 0) for name in names)
    rel = b"".join(
        struct.pack("<QQ", text_at + at, (names.index(name) + 1) << 32 | R_BPF_64_32) for at, name in sorted(calls)
    )
    entries = 10 if rel else 6
    dynsym_at = dynamic_at + 16 * entries
    dynstr_at = dynsym_at + len(dynsym)
    rel_at = dynstr_at + len(dynstr)
    tags = [(17, rel_at), (18, len(rel)), (19, 16), (0x6FFFFFFA, len(rel) // 16)] if rel else []
    tags += [(30, 4), (6, dynsym_at), (11, 24), (5, dynstr_at), (10, len(dynstr)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in tags)

    # name, type, flags, offset, data, link, info, align, entry size; link 4 is .dynstr when .rodata is there
    sections: list[tuple[str, int, int, int, bytes, int, int, int, int]] = [
        (".text", 1, 6, text_at, bytes(image.text), 0, 0, 8, 0)
    ]
    if image.rodata:
        sections.append((".rodata", 1, 2, rodata_at, bytes(image.rodata), 0, 0, 8, 0))
    dynsym_index = len(sections) + 2
    sections.append((".dynamic", 6, 2, dynamic_at, dynamic, dynsym_index + 1, 0, 8, 16))
    sections.append((".dynsym", 11, 2, dynsym_at, dynsym, dynsym_index + 1, 1, 8, 24))
    sections.append((".dynstr", 3, 2, dynstr_at, dynstr, 0, 0, 1, 0))
    if rel:
        sections.append((".rel.dyn", 9, 2, rel_at, rel, dynsym_index, 0, 8, 16))
    shstrtab, section_name_at = _string_table([section[0] for section in sections] + [".shstrtab"])
    shstrtab_at = rel_at + len(rel)
    sections.append((".shstrtab", 3, 0, shstrtab_at, shstrtab, 0, 0, 1, 0))
    table_at = shstrtab_at + len(shstrtab) + -len(shstrtab) % 8

    out = bytearray(_header(3, text_at + entry.offset, 0, 3, table_at, len(sections) + 1))
    for kind, flags, start, end in (
        (1, 5, text_at, dynamic_at),
        (1, 4, dynamic_at, shstrtab_at),
        (2, 6, dynamic_at, dynsym_at),
    ):
        out += struct.pack("<IIQQQQQQ", kind, flags, start, start, start, end - start, end - start, 8)
    for section in sections:
        out += section[4]
    out += bytes(-len(out) % 8) + bytes(64)
    for name, kind, flags, offset, data, link_to, info, align, size in sections:
        address = offset if flags & 2 else 0
        out += struct.pack(
            "<IIQQQQIIQQ", section_name_at[name], kind, flags, address, offset, len(data), link_to, info, align, size
        )
    return bytes(out)


def link(objects: Sequence[tuple[str, bytes]], arch: Arch = "v3", entry: str = "entrypoint") -> bytes:
    """Link objects, given as (name, bytes), into one program file; the same input gives the same bytes.

    Raises LinkError for an undefined or doubly defined symbol, writable data, 32-bit arithmetic, a name that is not a
    system call of mainnet, or a damaged object.
    """
    image = _Image([read_object(name, raw) for name, raw in objects])
    place = image.globals.get(entry)
    if place is None or place.area != "text":
        raise LinkError(f"no object defines the function {entry!r}")
    return _write_v3(image, place) if arch == "v3" else _write_v0(image, place)
