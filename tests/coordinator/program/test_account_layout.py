"""The C headers and the Python tables describe the same bytes, numbers and marks."""

from __future__ import annotations

import re
import struct

import pytest

from coordinator import layout
from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.instruction_data import MARKS
from coordinator.toolchain.build import PROGRAM_FOLDER
from coordinator.values import MemberStatus, Phase, Request

STATE = (PROGRAM_FOLDER / "state.h").read_text()
DEFINES = dict(re.findall(r"^#define (\w+) (\d+)\b", STATE, re.MULTILINE))
SIZES = {"u8": (1, 1), "u16": (2, 2), "u32": (4, 4), "u64": (8, 8), "key": (32, 8), "bitmap": (32, 8)}
RECORDS = {
    "inclusion": layout.INCLUSION,
    "limits": layout.LIMITS,
    "terms": layout.TERMS,
    "course": layout.COURSE,
    "run": layout.RUN,
    "member": layout.MEMBER,
    "members": layout.MEMBERS,
    "range": layout.RANGE,
    "round": layout.ROUND,
    "header": layout.HEADER,
    "rounds": layout.ROUNDS,
    "grant": layout.GRANT,
    "receipt": layout.RECEIPT,
}


def c_structs() -> dict[str, list[tuple[str, int, int]]]:
    """name -> (field, offset, size), laid out with C's natural alignment."""
    types = dict(SIZES)
    structs: dict[str, list[tuple[str, int, int]]] = {}
    text = re.sub(r"/\*.*?\*/", "", STATE, flags=re.DOTALL)
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        offset, largest, fields = 0, 1, []
        for kind, field, count in re.findall(r"^ +(?:struct )?(\w+) (\w+)(?:\[(\w+)\])?;", body, re.MULTILINE):
            size, align = types[kind]
            number = int(DEFINES.get(count, count)) if count else 1
            assert offset % align == 0, f"{name}.{field} has padding in front that is not written out"
            fields.append((field, offset, size * number))
            offset, largest = offset + size * number, max(largest, align)
        assert offset % largest == 0, f"{name} has padding at the end that is not written out"
        types[name] = (offset, largest)
        structs[name] = fields
    return structs


@pytest.mark.parametrize("name", RECORDS)
def test_structs_match(name: str) -> None:
    record = RECORDS[name]
    python = [(field, record.offsets[field], struct.calcsize("<" + code)) for field, code in record.fields]
    assert python == c_structs()[name]


def test_constants_match() -> None:
    same = ("VERSION", "MAX_MEMBERS", "MAX_WITNESSES", "ROUND_RING", "INCLUSION_RING", "MAX_RANGES", "MAX_REQUEUE")
    for name in (
        *same,
        "RECORD_VERSION",
        "MAX_DELEGATES",
        "MAX_BANNED",
        "COUNTER_PLANES",
        "MAX_SHARE",
        "INCLUSION_PRESENT",
        "INCLUSION_VOID",
    ):
        assert int(DEFINES[name]) == getattr(layout, name), name


def enum_body(text: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} \{{(.*?)\}};", text, re.DOTALL)
    assert body is not None
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body.group(1))}


def test_enums_match() -> None:
    assert enum_body(STATE, "phase") == {phase.name: phase.value for phase in Phase}
    statuses = {name.removeprefix("STATUS_"): value for name, value in enum_body(STATE, "status").items()}
    assert statuses == {status.name: status.value for status in MemberStatus}
    requests = {name.removeprefix("REQUEST_"): value for name, value in enum_body(STATE, "request").items()}
    assert requests == {request.name: request.value for request in Request}
    assert list(enum_body(STATE, "round_state").values()) == [
        layout.ROUND_UNUSED,
        layout.ROUND_OPEN,
        layout.ROUND_CLOSED,
        layout.ROUND_FINAL,
    ]


def test_errors_match_and_have_texts() -> None:
    c_errors = enum_body((PROGRAM_FOLDER / "errors.h").read_text(), "error")
    assert c_errors == {code.name: code.value for code in ErrorCode}
    assert sorted(c_errors.values()) == list(range(6000, 6000 + len(c_errors)))
    assert set(ERROR_TEXT) == set(ErrorCode)


def test_marks_match() -> None:
    text = (PROGRAM_FOLDER / "marks.h").read_text()
    marks = re.findall(r'0x([0-9a-f]{16})ull /\* "(\w+):(\w+)" \*/', text)
    assert {name for _, kind, name in marks if kind == "global"} == set(MARKS)
    for value, kind, name in marks:
        assert int(value, 16) == int.from_bytes(layout.discriminator(kind, name), "little"), name


def test_account_sizes() -> None:
    """What a node is pushed per round is the run account and the header; the tables are fetched."""
    assert (layout.RUN_SIZE, layout.HEADER_SIZE) == (1536, 256)
    assert layout.MEMBERS_SIZE == 43_264
    assert (layout.GRANT_SIZE, layout.RECEIPT_SIZE) == (1152, 160)
    assert layout.ROUNDS_SIZE == 97_408
    assert layout.round_offset(5) == layout.round_offset(1) == layout.ROUNDS.offsets["ring"] + layout.ROUND_SIZE
