"""The tables of events against `events.h`, and events in logs that others write into."""

from __future__ import annotations

import base64
import re
import struct

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from coordinator.events import EVENTS, decode_event, events_in
from coordinator.layout import MAX_MEMBERS, MAX_RANGES, discriminator
from coordinator.toolchain.build import PROGRAM_FOLDER

HEADER = (PROGRAM_FOLDER / "events.h").read_text()
MARKS = (PROGRAM_FOLDER / "marks.h").read_text()
SHARED = {
    "MemberReady": "member",
    "MemberLeft": "member",
    "MembersDropped": "members",
    "MembersDesynced": "members",
    "MembersEjected": "members",
    "ConfigRequested": "config",
    "ConfigChanged": "config",
    "Attested": "members",
    "MemberArchived": "credit",
    "MemberRestored": "credit",
    "Authorized": "key",
    "Revoked": "key",
}
SIZES = {"u8": 1, "u32": 4, "u64": 8, "key": 32, "bitmap": 32, "range": 16}
COUNTS = {"MAX_RANGES": MAX_RANGES, "MAX_MEMBERS": MAX_MEMBERS}


def c_struct(name: str) -> list[tuple[str, int]]:
    body = re.search(rf"^struct event_{name} \{{\n(.*?)^\}};", HEADER, re.MULTILINE | re.DOTALL)
    assert body is not None, name
    fields = re.findall(r"^ +(?:struct )?(\w+) (\w+)(?:\[(\w+)\])?;", body.group(1), re.MULTILINE)
    return [
        (field, SIZES[kind] * (COUNTS[count] if count in COUNTS else int(count or 1))) for kind, field, count in fields
    ]


def test_every_event_has_its_struct() -> None:
    assert set(re.findall(r'"event:(\w+)"', MARKS)) == set(EVENTS)
    for name, record in EVENTS.items():
        snake = re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
        fields = [(field, struct.calcsize("<" + code)) for field, code in record.fields]
        assert fields == c_struct(SHARED.get(name, snake)), name


def event_bytes(run: Pubkey, round: int) -> bytes:
    return EVENTS["MemberReady"].pack(mark=discriminator("event", "MemberReady"), run=bytes(run), round=round, member=3)


def test_only_what_the_program_itself_logs_counts() -> None:
    program, other, run = (Keypair().pubkey() for _ in range(3))
    data = ["Program data: " + base64.b64encode(event_bytes(run, number)).decode() for number in range(6)]
    logs = [
        data[0],
        f"Program {other} invoke [1]",
        data[1],
        f"Program {program} invoke [2]",
        data[2],
        f"Program log: Program {program} invoke [3]",
        f"Program {other} invoke [3]",
        data[3],
        f"Program {other} success",
        f"Program {program} consumed 100 of 200 compute units",
        data[4],
        "Program data: ****",
        "Program data: " + base64.b64encode(b"12345678").decode(),
        f"Program {program} success",
        data[5],
        f"Program {other} failed: custom program error: 0x1",
    ]
    found = list(events_in(logs, program))
    assert [one.fields["round"] for one in found] == [2, 4]
    assert found[0].run == run
    assert found[0].fields == {"round": 2, "member": 3}


def test_other_bytes_are_no_event() -> None:
    data = event_bytes(Keypair().pubkey(), 1)
    assert decode_event(data) is not None
    assert decode_event(data[:-1]) is None
    assert decode_event(data + b"\0") is None
    assert decode_event(b"") is None
