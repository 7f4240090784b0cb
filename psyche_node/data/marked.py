"""Where parts of a message come to lie in the rendered text.

A template is a program: it may trim, wrap, repeat or drop what it is given. So the places are not searched for. The
conversation is rendered again with noncharacters of Unicode set into its strings, which no text may contain, and their
places are read off. The result counts only if without them it is the very text that was rendered before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

QUOTE, BOUND, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Inside the spelling of a control token; at the end of a span of a message; at the end of cut reasoning."""
_ANY = re.compile(f"[{QUOTE}{BOUND}{CLOSE}]")


def holds_mark(text: str) -> bool:
    return bool(_ANY.search(text))


def strip_marks(text: str) -> tuple[str, dict[str, list[int]]]:
    """Return the text without marks, and by mark its places: the number of characters before it."""
    places: dict[str, list[int]] = {QUOTE: [], BOUND: [], CLOSE: []}
    for number, match in enumerate(_ANY.finditer(text)):
        places[match.group()].append(match.start() - number)
    return _ANY.sub("", text), places


def mark_spellings(value: Any, spelled: re.Pattern[str], allowed: frozenset[str] = frozenset()) -> Any:
    """Return ``value`` (JSON) with a mark inside each match of ``spelled`` in its strings but ``allowed`` ones."""
    return _mapped(value, lambda text: spelled.sub(lambda match: _quoted(match.group(), allowed), text))


def spells(value: Any, spelled: re.Pattern[str], allowed: frozenset[str] = frozenset()) -> bool:
    """Whether `mark_spellings` would change ``value``."""
    if isinstance(value, str):
        return any(match.group() not in allowed for match in spelled.finditer(value))
    if isinstance(value, dict):
        return any(spells(key, spelled, allowed) or spells(part, spelled, allowed) for key, part in value.items())
    return isinstance(value, (list, tuple)) and any(spells(part, spelled, allowed) for part in value)


def mark_bounds(text: str, places: list[int]) -> str:
    """Return ``text`` with a mark at each of the places, which do not decrease."""
    cuts = [0, *places, len(text)]
    return BOUND.join(text[a:b] for a, b in pairwise(cuts))


def _quoted(text: str, allowed: frozenset[str]) -> str:
    return text if text in allowed else text[:1] + QUOTE + text[1:]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(part, change) for part in value]
    return value
