"""Where parts of a message come to lie in the rendered text.

A template is a program: it may trim, wrap, repeat or drop what it is given. So the places are not searched for. The
conversation is rendered again with noncharacters of Unicode set into its strings, which no text may contain, and their
places are read off. The result counts only if without them it is the very text that was rendered before.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

QUOTE, BOUND, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Inside the spelling of a control token; at the end of a span of a message; at the end of cut reasoning."""
_SAYABLE = frozenset(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<seed:think>", "</seed:think>", "<seed:cot_budget_reflect>", "</seed:cot_budget_reflect>"),
        *("<seed:tool_call>", "</seed:tool_call>"),
    ]
)
"""Control tokens that the assistant's own text may spell: it generates them between its words."""
_ANY = re.compile(f"[{QUOTE}{BOUND}{CLOSE}]")


def holds_mark(text: str) -> bool:
    return bool(_ANY.search(text))


def strip_marks(text: str) -> tuple[str, dict[str, list[int]]]:
    """Return the text without marks, and by mark its places: the number of characters before it."""
    places: dict[str, list[int]] = {QUOTE: [], BOUND: [], CLOSE: []}
    for number, match in enumerate(_ANY.finditer(text)):
        places[match.group()].append(match.start() - number)
    return _ANY.sub("", text), places


def spells(messages: Sequence[Any], others: Any, spelled: re.Pattern[str]) -> bool:
    """Whether a conversation spells control tokens that are not its template's: whether `mark_spellings` changes it.

    ``others`` (JSON): what it has beside messages, such as tools. ``spelled`` matches the text of any control token.
    The assistant may spell those that it says between its words.
    """
    return _spells(others, spelled, frozenset()) or any(_spells(one, spelled, _sayable(one)) for one in messages)


def mark_spellings(messages: Sequence[Any], others: Any, spelled: re.Pattern[str]) -> tuple[list[Any], Any]:
    """Return messages and others (JSON) with a mark inside each spelling that `spells` means."""
    return [_marked(one, spelled, _sayable(one)) for one in messages], _marked(others, spelled, frozenset())


def mark_bounds(text: str, places: list[int]) -> str:
    """Return ``text`` with a mark at each of the places, which do not decrease and count no marks in it."""
    _, marks = strip_marks(text)
    cuts = [0, *(place + bisect_left(marks[QUOTE], place) for place in places), len(text)]
    return BOUND.join(text[a:b] for a, b in pairwise(cuts))


def _sayable(message: Any) -> frozenset[str]:
    return _SAYABLE if message["role"] == "assistant" else frozenset()


def _spells(value: Any, spelled: re.Pattern[str], allowed: frozenset[str]) -> bool:
    if isinstance(value, str):
        return any(match.group() not in allowed for match in spelled.finditer(value))
    if isinstance(value, dict):
        return any(_spells(key, spelled, allowed) or _spells(part, spelled, allowed) for key, part in value.items())
    return isinstance(value, (list, tuple)) and any(_spells(part, spelled, allowed) for part in value)


def _marked(value: Any, spelled: re.Pattern[str], allowed: frozenset[str]) -> Any:
    return _mapped(value, lambda text: spelled.sub(lambda match: _quoted(match.group(), allowed), text))


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
