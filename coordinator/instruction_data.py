"""The data of the program's instructions: an 8-byte Anchor mark, then fixed-size little-endian fields."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Final

from coordinator.layout import COURSE, LIMITS, TERMS, discriminator
from coordinator.state import Limits, Terms

INSTRUCTIONS: Final = (
    "init_run",
    "migrate",
    "set_config",
    "set_model",
    "pause",
    "resume",
    "finish",
    "close_run",
    "kick",
    "ban",
    "set_reward_rate",
    "authorize",
    "revoke",
    "delegate",
    "join",
    "ready",
    "set_share",
    "commit",
    "attest",
    "checkpoint",
    "leave",
    "archive",
    "restore",
    "reclaim",
    "claim",
    "tick",
)
MARKS: Final = {name: discriminator("global", name) for name in INSTRUCTIONS}
MAX_SOURCE_BYTES: Final = 64


def fixed(value: bytes, size: int, what: str) -> bytes:
    """The bytes themselves. Raises ValueError, which names `what`, where they are not `size` bytes."""
    if len(value) != size:
        raise ValueError(f"{what} has {len(value)} bytes, it must have {size}")
    return value


def pack(layout: str, what: str, *values: int | bytes) -> bytes:
    """`struct.pack`, little-endian. Raises ValueError, which names `what`, for a value that does not fit."""
    try:
        return struct.pack("<" + layout, *values)
    except struct.error as error:
        raise ValueError(f"{what}: {error}") from error


def pack_limits(limits: Limits) -> bytes:
    """Raises ValueError, which names the field, for a value that does not fit."""
    values = {field.name: getattr(limits, field.name) for field in fields(limits)}
    for name, value in values.items():
        if not 0 <= value < 2**32:
            raise ValueError(f"limits.{name} = {value} is outside 0..2^32-1")
    return LIMITS.pack(**values)


def pack_terms(terms: Terms) -> bytes:
    """Raises ValueError, which names the field, for a value that does not fit."""
    values: dict[str, int | bytes] = {}
    for name, code in TERMS.fields:
        value = getattr(terms, name)
        if isinstance(value, str):
            encoded = value.encode("utf-8")
            if len(encoded) > MAX_SOURCE_BYTES or b"\0" in encoded:
                raise ValueError(f"terms.{name} has {len(encoded)} bytes; it may have {MAX_SOURCE_BYTES}, without NUL")
            values[name] = encoded
        elif isinstance(value, bytes):
            values[name] = fixed(value, struct.calcsize(code), f"terms.{name}")
        else:
            if not 0 <= int(value) < 2 ** (8 * struct.calcsize(code)):
                raise ValueError(f"terms.{name} = {value} does not fit its {8 * struct.calcsize(code)}-bit field")
            values[name] = int(value)
    return TERMS.pack(**values)


def pack_course(terms: Terms) -> bytes:
    """The terms that the program keeps apart from the others."""
    names = [name for name, _ in COURSE.fields if name != "reserved"]
    values = {name: int(getattr(terms, name)) for name in names}
    for name, value in values.items():
        if not 0 <= value < 2**32:
            raise ValueError(f"terms.{name} = {value} does not fit its 32-bit field")
    return COURSE.pack(**values)
