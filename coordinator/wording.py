"""What pydantic found wrong with values, in this project's words: where, what is there, what it must be.

One wording for run.toml, the node's settings, task files, reports and requests. Nothing here knows of a chain.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]
Sources = Sequence[tuple[str, Mapping[str, Any]]]
"""Names of where values are from, and the tables there; those that win come first."""

_BRANCH: Final = re.compile(r"str|int|float|bool|constrained-\w+|.*\[.*\]|[A-Z]\w*")
"""Parts of a location that name no key, but which kind of value pydantic tried."""
_KINDS: Final = {
    "string": "a string",
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object with keys of its own",
    "model": "an object with keys of its own",
    "path": "a path",
}
_BOUNDS: Final = {
    "greater_than": ("more than {}", "gt"),
    "greater_than_equal": ("at least {}", "ge"),
    "less_than": ("less than {}", "lt"),
    "less_than_equal": ("at most {}", "le"),
}
_SIZES: Final = {
    "too_short": ("entries", "at least {}", "min_length"),
    "too_long": ("entries", "at most {}", "max_length"),
    "string_too_short": ("characters", "at least {}", "min_length"),
    "string_too_long": ("characters", "at most {}", "max_length"),
}
_HEX: Final = re.compile(r"\^\[0-9a-f(?:A-F)?\]\{64\}\$")
_LONGEST: Final = 60


def problems(
    error: ValidationError, model: type[BaseModel] | None = None, section: str = "", sources: Sources = ()
) -> list[tuple[str, str]]:
    """(place, what is wrong there) of every place that has a mistake; the place is "" for the whole.

    Args:
        error: what validation raised.
        model: what was validated; with it an unknown key comes with the keys that are known.
        section: where the model's keys stand in what the user wrote.
        sources: with them, a value comes with the name of the place that it is from.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in error.errors(include_url=False):
        where = ".".join(filter(None, (section, place(one["loc"], one["type"]))))
        found.setdefault(where, []).append(one)
    return [(where, _together(errors, model, sources)) for where, errors in found.items()]


def _together(errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None, sources: Sources) -> str:
    """What is wrong at one place. Where a value may be of several kinds, it has an error for each: all are named."""
    words = in_words(errors[0], model, sources)
    rules = [_rule(one["type"], one.get("ctx", {})) for one in errors]
    others = [rule.removeprefix("be ") for rule in dict.fromkeys(rules[1:]) if rule not in (None, rules[0])]
    return " or ".join((words, *others)) if rules[0] is not None else words


def place(location: Location, kind: str = "") -> str:
    """Where in a value an error of some kind is, such as ``messages[0].content``."""
    parts = list(location)
    last = [parts.pop()] if kind == "extra_forbidden" else []  # a key for certain, whatever it looks like
    names = [one for one in parts if not _BRANCH.fullmatch(str(one))] + last
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in names).removeprefix(".")


def in_words(error: Mapping[str, Any], model: type[BaseModel] | None = None, sources: Sources = ()) -> str:
    """What is wrong by one of pydantic's ``errors()``, as something to be read behind the place and a colon."""
    kind, limits, value = error["type"], error.get("ctx", {}), error["input"]
    origin = next((f" ({name})" for name, table in sources if error["loc"] and has(table, error["loc"])), "")
    if kind == "missing":
        return "it is missing"
    if kind == "extra_forbidden":
        return no_such_key(error["loc"], model, origin)
    if kind == "json_invalid":
        return f"it is not JSON: {limits['error']}"
    if kind == "value_error":
        return f"{limits['error']}{origin}"
    if kind in _SIZES:
        unit, words, limit = _SIZES[kind]
        return f"it has {len(value):,} {unit}{origin}; it must have {words.format(f'{limits[limit]:,}')}"
    rule = _rule(kind, limits)
    if rule is None:
        return f"it is {_shown(value)}{origin}: {error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"it is {_shown(value)}{origin}; it must {rule}"


def _rule(kind: str, limits: Mapping[str, Any]) -> str | None:
    if kind == "literal_error":
        return f"be {limits['expected']}"
    if kind in _BOUNDS:
        words, limit = _BOUNDS[kind]
        return f"be {words.format(limits[limit])}"
    if kind == "string_pattern_mismatch":
        return "be 32 bytes in hex: 64 digits" if _HEX.fullmatch(limits["pattern"]) else f"match {limits['pattern']}"
    wanted = _KINDS.get(kind.split("_")[0])
    return None if wanted is None else f"be {wanted}"


def no_such_key(location: Location, model: Any, origin: str = "") -> str:
    """What is wrong with an unknown key: which are known beside it, or the nearest of them and of those in a section
    there."""
    said = f"there is no such key{origin}"
    for part in location[:-1]:
        model = _fields(model).get(str(part))
    known = _fields(model)
    if not known:
        return said
    places = {name: f"{section}.{name}" for section, inner in known.items() for name in _fields(inner)}
    places |= {name: name for name in known}
    near = difflib.get_close_matches(str(location[-1]), places, 1)
    return said + (f"; did you mean {places[near[0]]}?" if near else f"; known are {', '.join(known)}")


def _fields(model: Any) -> dict[str, Any]:
    """The keys of a section, and what each holds; empty for what is none."""
    return {name: field.annotation for name, field in getattr(model, "model_fields", {}).items()}


def has(table: Any, location: Sequence[int | str]) -> bool:
    """Whether there is a value at a location in tables of tables."""
    for part in location:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list, tuple)) and value:
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[: _LONGEST + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
