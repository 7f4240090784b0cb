"""What somebody else has chosen, such as a run's name, made fit for a terminal."""

from __future__ import annotations

from typing import Final

LINES: Final = "\n\t"
"""What a message of several lines keeps."""


def printable(text: str, keep: str = "") -> str:
    """`text` with a replacement character for each one that is not printable, except for those in `keep`.

    So no escape sequence reaches the terminal, no line break forges a line, and no mark turns the text around.
    """
    return "".join(one if one.isprintable() or one in keep else "\N{REPLACEMENT CHARACTER}" for one in text)
