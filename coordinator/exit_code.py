"""What an exit code of a command is: a number with a name, what it means and how to resolve it."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """Base of each command's codes. The reference page of exit codes is generated from their texts."""

    meaning: str
    resolve: str

    def __new__(cls, code: int, meaning: str, resolve: str) -> Self:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning, member.resolve = meaning, resolve
        return member
