"""Reading the compiler's relocatable objects: the part of ELF64 that clang's BPF target writes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

EM_BPF: Final = 247
ET_REL: Final = 1
SHT_SYMTAB: Final = 2
SHT_RELA: Final = 4
SHT_NOBITS: Final = 8
SHT_REL: Final = 9
SHF_WRITE: Final = 1
SHF_ALLOC: Final = 2
SHF_EXEC: Final = 4
SHN_ABS: Final = 0xFFF1
SHN_COMMON: Final = 0xFFF2


class LinkError(Exception):
    """The objects cannot become a program. Says in which object and section, and why."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section of an object; `data` is empty for sections without bytes in the file."""

    name: str
    kind: int
    flags: int
    link: int
    info: int
    align: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol: `section` is an index into the object's sections, 0 when undefined."""

    name: str
    value: int
    bind: int
    section: int


@dataclass(frozen=True, slots=True)
class Relocation:
    """`kind` at byte `offset` of the section that the relocation section names."""

    offset: int
    kind: int
    symbol: int


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """A parsed relocatable object. `relocations` maps a section index to its relocations."""

    name: str
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]
    relocations: dict[int, tuple[Relocation, ...]]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode("ascii")


def _sections(name: str, raw: bytes) -> tuple[Section, ...]:
    (table,) = struct.unpack_from("<Q", raw, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", raw, 58)
    if entry_size != 64 or table + count * 64 > len(raw):
        raise LinkError(f"{name}: the section table does not fit the file")
    headers = [struct.unpack_from("<IIQQQQIIQQ", raw, table + 64 * index) for index in range(count)]
    names = raw[headers[names_index][4] : headers[names_index][4] + headers[names_index][5]]
    sections = []
    for name_at, kind, flags, _, offset, size, link, info, align, _ in headers:
        data = b"" if kind in (0, SHT_NOBITS) else raw[offset : offset + size]
        if kind not in (0, SHT_NOBITS) and len(data) != size:
            raise LinkError(f"{name}: section {_string(names, name_at)} reaches past the end of the file")
        sections.append(Section(_string(names, name_at), kind, flags, link, info, align or 1, size, data))
    return tuple(sections)


def read_object(name: str, raw: bytes) -> ObjectFile:
    """Parse a relocatable object. Raises LinkError for anything but a little-endian ELF64 BPF object with REL."""
    if len(raw) < 64 or raw[:6] != b"\x7fELF\x02\x01":
        raise LinkError(f"{name}: not a little-endian 64-bit ELF file")
    kind, machine = struct.unpack_from("<HH", raw, 16)
    if kind != ET_REL or machine != EM_BPF:
        raise LinkError(
            f"{name}: ELF type {kind} for machine {machine}; expected a relocatable object (1) for BPF (247)"
        )
    try:
        sections = _sections(name, raw)
        symbols: tuple[Symbol, ...] = ()
        relocations: dict[int, tuple[Relocation, ...]] = {}
        for section in sections:
            if section.kind == SHT_SYMTAB:
                names = sections[section.link].data
                symbols = tuple(
                    Symbol(_string(names, name_at), value, info >> 4, index)
                    for name_at, info, _, index, value, _ in struct.iter_unpack("<IBBHQQ", section.data)
                )
            elif section.kind == SHT_REL:
                relocations[section.info] = tuple(
                    Relocation(offset, info & 0xFFFFFFFF, info >> 32)
                    for offset, info in struct.iter_unpack("<QQ", section.data)
                )
            elif section.kind == SHT_RELA:
                raise LinkError(f"{name}: section {section.name} has RELA relocations; BPF objects use REL")
    except (struct.error, IndexError, ValueError) as error:
        raise LinkError(f"{name}: damaged ELF file ({error})") from error
    return ObjectFile(name, sections, symbols, relocations)
