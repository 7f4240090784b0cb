"""The program's interface description (IDL) for Anchor clients and explorers: `python -m coordinator.idl [--check]`.

Both of Anchor's formats are generated from the tables that the project itself reads and writes by (`layout.py`,
`events.py`, `errors.py`, `instructions.py`) into `program/idl/`: `coordinator.json` as of Anchor 0.30, and
`coordinator.legacy.json`, which anchorpy and older explorers read. All records are fixed-size and little-endian with
explicit padding, so that C's layout is Borsh's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordinator import layout
from coordinator.errors import ERROR_TEXT, ErrorCode
from coordinator.events import EVENTS
from coordinator.instruction_data import INSTRUCTIONS
from coordinator.layout import Record, discriminator

FOLDER: Final = Path(__file__).resolve().parent / "program" / "idl"
NAME: Final = "coordinator"
# Whoever runs a run may deploy the program; `psyche-admin program idl ADDRESS` fills in the address.
NO_ADDRESS: Final = "11111111111111111111111111111111"

_INTEGERS: Final = {"B": "u8", "I": "u32", "Q": "u64"}
_MARKS: Final = frozenset({"discriminator", "mark"})
# 32 bytes that are keys, and so shown in base58; other 32 bytes are digests, roots and texts.
_KEYS: Final = frozenset(
    {
        "run",
        "members",
        "rounds",
        "owner",
        "wallet",
        "node_key",
        "grant",
        "grantee",
        "authority",
        "join_authority",
        "payer",
        "reward_mint",
        "reward_vault",
        "key",
    }
)
_ACCOUNTS: Final = {
    "Run": layout.RUN,
    "Members": layout.MEMBERS,
    "Rounds": layout.ROUNDS,
    "Grant": layout.GRANT,
    "Receipt": layout.RECEIPT,
}
_PARTS: Final = {
    "Limits": layout.LIMITS,
    "Terms": layout.TERMS,
    "Course": layout.COURSE,
    "Inclusion": layout.INCLUSION,
    "Member": layout.MEMBER,
    "Range": layout.RANGE,
    "Round": layout.ROUND,
    "Header": layout.HEADER,
}
# Records inside records: (record, field) -> what it is made of.
_NESTED: Final = {
    ("run", "inclusion"): "Inclusion",
    ("run", "limits"): "Limits",
    ("run", "next_limits"): "Limits",
    ("run", "terms"): "Terms",
    ("run", "course"): "Course",
    ("members", "member"): "Member",
    ("rounds", "header"): "Header",
    ("rounds", "requeue"): "Range",
    ("rounds", "ring"): "Round",
    ("round", "range"): "Range",
    ("RoundStarted", "range"): "Range",
}
# Keys in a row, without a record of their own.
_KEY_ARRAYS: Final = frozenset({("members", "banned"), ("grant", "delegate")})


@dataclass(frozen=True, slots=True)
class Call:
    """An instruction: what it does, who signs, which of the run's accounts it writes, and its data in file order.

    `paid`: the signers get lamports. `tables`: members and rounds are among the accounts. `extra` are accounts behind
    the run's: (name, writable, optional). Arguments are (name, struct code or the name of a record).
    """

    doc: str
    signers: tuple[str, ...]
    writes: str
    args: tuple[tuple[str, str], ...] = ()
    extra: tuple[tuple[str, bool, bool], ...] = ()
    paid: bool = False
    tables: bool = True


_ALL: Final = "run members rounds"
_PAD: Final = ("reserved", "I")
_GRANT: Final = (("grant", True, False),)
_RECEIPT: Final = (("receipt", True, False),)
CALLS: Final = {
    "init_run": Call(
        "Turn three accounts, created by the owner before it in the transaction, into a run.",
        ("owner",),
        _ALL,
        (
            ("run_id", "32s"),
            ("run_id_length", "B"),
            ("pad", "7s"),
            ("limits", "Limits"),
            ("terms", "Terms"),
            ("join_authority", "32s"),
            ("course", "Course"),
        ),
    ),
    "migrate": Call("Bring accounts of the version before to this version's layout. Anyone may.", ("payer",), _ALL),
    "set_config": Call(
        "New limits from the next round on; the join authority at once (zero: anyone may join).",
        ("owner",),
        "run rounds",
        (("limits", "Limits"), ("join_authority", "32s")),
    ),
    "set_model": Call(
        "Another model, other data or optimizer settings, while nobody trains.",
        ("owner",),
        "run members rounds",
        (("terms", "Terms"), ("course", "Course")),
    ),
    "pause": Call("Pause once the round in flight is final and its checkpoint agreed.", ("owner",), "run rounds"),
    "resume": Call("Go on, or take back a pause.", ("owner",), _ALL),
    "finish": Call("End the run once its round is final.", ("owner",), "run rounds"),
    "close_run": Call("Delete a finished run; its lamports go to the owner.", ("owner",), _ALL, paid=True),
    "kick": Call("Put a member out; it may join again.", ("owner",), _ALL, (("wallet", "32s"),)),
    "ban": Call("Keep a key out, or lift that.", ("owner",), _ALL, (("key", "32s"), ("lift", "I"), _PAD)),
    "set_reward_rate": Call("Lamports per million tokens from now on.", ("owner",), "run rounds", (("rate", "Q"),)),
    "authorize": Call("Let a grantee join (zero: anyone).", ("authority",), "", (("grantee", "32s"),), _GRANT),
    "revoke": Call("Take a grant back.", ("authority",), _ALL, (("eject", "I"), _PAD), _GRANT, paid=True),
    "delegate": Call(
        "Let another key of the grantee's join under its grant, or remove it.",
        ("grantee",),
        "",
        (("key", "32s"), ("remove", "I"), _PAD),
        _GRANT,
    ),
    "join": Call(
        "Become a member. The grant is needed where the run has a join authority.",
        ("wallet", "node_key"),
        "members rounds",
        (("share", "I"), _PAD),
        (("grant", False, True),),
    ),
    "ready": Call("Report the model loaded.", ("wallet",), "members rounds", (("root", "32s"),)),
    "set_share": Call("Another share from the next round on.", ("wallet",), "members", (("share", "I"), _PAD)),
    "commit": Call(
        "Commit to this round's update, before its bytes are served.",
        ("wallet",),
        "rounds",
        (
            ("round", "I"),
            _PAD,
            ("digest", "32s"),
            ("length", "Q"),
            ("tokens", "Q"),
            ("fingerprint", "Q"),
        ),
    ),
    "attest": Call(
        "As a witness: the members whose committed updates it holds and has validated.",
        ("wallet",),
        "rounds",
        (("round", "I"), _PAD, ("members", "4Q")),
    ),
    "checkpoint": Call(
        "The model root before a round.", ("wallet",), "rounds", (("round", "I"), _PAD, ("root", "32s"))
    ),
    "leave": Call("Leave the run; credit stays.", ("wallet",), "members rounds"),
    "archive": Call(
        "Move the credit of a member that is gone into a fresh receipt.",
        ("payer",),
        "members",
        (("slot", "I"), _PAD),
        _RECEIPT,
    ),
    "restore": Call("Move a receipt's credit back.", ("wallet",), "members", (), (*_RECEIPT, ("payer", True, False))),
    "reclaim": Call(
        "After a run was closed: the lamports of a receipt go back to its payer, of a grant to the authority.",
        ("payer",),
        "",
        (),
        (("record", True, False),),
        paid=True,
        tables=False,
    ),
    "claim": Call(
        "Have earned rewards paid: of the wallet's slot, or of a receipt.",
        ("wallet",),
        "run members",
        (),
        (("receipt", True, True),),
        paid=True,
    ),
    "tick": Call("Make the transition that is due. Anyone may.", ("payer",), _ALL),
}


# ---------------------------------------------------------------------- both formats


def modern(address: str = NO_ADDRESS) -> dict[str, Any]:
    """The IDL as of Anchor 0.30."""
    types = {**_PARTS, **_ACCOUNTS, **EVENTS}
    return {
        "address": address,
        "metadata": {
            "name": NAME,
            "version": f"0.{layout.VERSION}.0",
            "spec": "0.1.0",
            "description": "Coordinator of decentralized training runs",
        },
        "instructions": [_modern_instruction(name, CALLS[name]) for name in INSTRUCTIONS],
        "accounts": [{"name": name, "discriminator": list(discriminator("account", name))} for name in _ACCOUNTS],
        "events": [{"name": name, "discriminator": list(discriminator("event", name))} for name in EVENTS],
        "errors": [{"code": int(code), "name": _pascal(code.name), "msg": ERROR_TEXT[code]} for code in ErrorCode],
        "types": [
            {
                "name": name,
                "serialization": "bytemuck",
                "repr": {"kind": "c"},
                "type": {"kind": "struct", "fields": _fields(record, "pubkey", str)},
            }
            for name, record in types.items()
        ],
    }


def legacy(address: str = NO_ADDRESS) -> dict[str, Any]:
    """The IDL before Anchor 0.30."""
    return {
        "version": f"0.{layout.VERSION}.0",
        "name": NAME,
        "instructions": [_legacy_instruction(name, CALLS[name]) for name in INSTRUCTIONS],
        "accounts": [_legacy_struct(name, record) for name, record in _ACCOUNTS.items()],
        "types": [_legacy_struct(name, record) for name, record in _PARTS.items()],
        "events": [
            {
                "name": name,
                "fields": [{**one, "index": False} for one in _fields(record, "publicKey", _camel)],
            }
            for name, record in EVENTS.items()
        ],
        "errors": [{"code": int(code), "name": _pascal(code.name), "msg": ERROR_TEXT[code]} for code in ErrorCode],
        "metadata": {"address": address},
    }


def _modern_instruction(name: str, call: Call) -> dict[str, Any]:
    accounts = []
    for account, writable, signer, optional in _metas(call):
        flags = {"writable": writable, "signer": signer, "optional": optional}
        accounts.append({"name": account, **{key: True for key, value in flags.items() if value}})
    return {
        "name": name,
        "docs": [call.doc],
        "discriminator": list(discriminator("global", name)),
        "accounts": accounts,
        "args": _args(call, "pubkey", str),
    }


def _legacy_instruction(name: str, call: Call) -> dict[str, Any]:
    # Clients of this format pass every account that is listed: an optional one is a remaining account there.
    metas = [one for one in _metas(call) if not one[3]]
    return {
        "name": _camel(name),
        "docs": [call.doc],
        "accounts": [
            {"name": _camel(account), "isMut": writable, "isSigner": signer} for account, writable, signer, _ in metas
        ],
        "args": _args(call, "publicKey", _camel),
    }


def _metas(call: Call) -> list[tuple[str, bool, bool, bool]]:
    """(name, writable, signer, optional) of every account, in order."""
    metas = [(name, call.paid, True, False) for name in call.signers]
    of_run = ("run", "members", "rounds") if call.tables else ("run",)
    metas += [(name, name in call.writes.split(), False, False) for name in of_run]
    return metas + [(name, writable, False, optional) for name, writable, optional in call.extra]


def _args(call: Call, key: str, name: Callable[[str], str]) -> list[dict[str, Any]]:
    return [
        {"name": name(arg), "type": _defined(code, key) if code in _PARTS else _type("", arg, code, key)}
        for arg, code in call.args
    ]


def _legacy_struct(name: str, record: Record) -> dict[str, Any]:
    return {"name": name, "type": {"kind": "struct", "fields": _fields(record, "publicKey", _camel)}}


def _fields(record: Record, key: str, name: Callable[[str], str]) -> list[dict[str, Any]]:
    """A record's fields but its mark, which Anchor's clients put in front by themselves. The rounds account begins with
    its header, whose mark is the account's."""
    return [
        {"name": name(field), "type": _type(record.name, field, code, key)}
        for field, code in record.fields
        if field not in _MARKS
    ]


def _type(record: str, field: str, code: str, key: str) -> Any:
    count, kind = _split(code)
    nested = _NESTED.get((record, field))
    if nested is not None:
        times = count // _PARTS[nested].size
        one = _defined(nested, key)
        return one if times == 1 else {"array": [one, times]}
    if kind == "s":
        if (record, field) in _KEY_ARRAYS:
            return {"array": [key, count // 32]}
        return key if count == 32 and field in _KEYS else {"array": ["u8", count]}
    return _INTEGERS[kind] if count == 1 else {"array": [_INTEGERS[kind], count]}


def _defined(name: str, key: str) -> dict[str, Any]:
    return {"defined": {"name": name} if key == "pubkey" else name}


def _split(code: str) -> tuple[int, str]:
    found = re.fullmatch(r"(\d*)([BIQs])", code)
    if found is None:
        raise ValueError(f"struct code {code!r} has no type in an IDL")
    return int(found.group(1) or 1), found.group(2)


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _pascal(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


# ---------------------------------------------------------------------- files


def texts() -> dict[str, str]:
    """File name -> contents."""
    return {
        f"{NAME}.json": json.dumps(modern(), indent=1) + "\n",
        f"{NAME}.legacy.json": json.dumps(legacy(), indent=1) + "\n",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 1: --check found a file that is not current."""
    parser = argparse.ArgumentParser(prog="python -m coordinator.idl", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not current")
    check = parser.parse_args(arguments).check
    stale = []
    for name, text in texts().items():
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(FOLDER.parents[2])}")
    if check and stale:
        print(f"not current: {', '.join(stale)}. Run: python -m coordinator.idl")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
