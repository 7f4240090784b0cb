"""What pydantic found wrong with a value, in this project's words: where, what it is, what it may be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

_BRANCH = re.compile(r"str|int|float|bool|constrained-str|.*\[.*\]|[A-Z]\w*")
"""Parts of a location that name no key, but which kind of value pydantic tried."""
_KINDS = {
    "string": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "path": "a path",
}
_LONGEST = 60


def problems(error: ValidationError, model: type[BaseModel] | None = None) -> list[tuple[str, str]]:
    """Return (place, what is wrong there) of every place that has a mistake; the place is "" for the whole.

    With the ``model``, an unknown key comes with the keys that are known.
    """
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        found.setdefault(place(one["loc"]), in_words(one, model))
    return list(found.items())


def place(location: tuple[int | str, ...]) -> str:
    """Return where in a value an error is, such as ``messages[0].content``."""
    names = (f"[{one}]" if isinstance(one, int) else f".{one}" for one in location if not _BRANCH.fullmatch(str(one)))
    return "".join(names).removeprefix(".")


def in_words(error: Mapping[str, Any], model: type[BaseModel] | None = None) -> str:
    """Return what is wrong by one of pydantic's ``errors()``, as something to be read behind the place and a colon."""
    kind, limits, value = error["type"], error.get("ctx", {}), _shown(error["input"])
    if kind == "missing":
        return "it is missing"
    if kind == "extra_forbidden":
        return "there is no such key" + _known(error, model)
    if kind == "json_invalid":
        return f"it is not JSON: {limits['error']}"
    if kind == "value_error":
        return str(limits["error"])
    if kind == "literal_error":
        return f"it is {value}; allowed: {limits['expected']}"
    if kind in _BOUNDS:
        words, limit = _BOUNDS[kind]
        return f"it is {value}; {words.format(limits[limit])}"
    if kind in _SIZES:
        words, limit = _SIZES[kind]
        return f"it has {len(error['input'])} {words.format(limits[limit])}"
    if kind == "string_pattern_mismatch":
        return f"it is {value}; it must match {limits['pattern']}"
    if (wanted := _KINDS.get(kind.split("_")[0])) is not None:
        return f"it is {value}; it must be {wanted}"
    return f"it is {value}: {error['msg'][:1].lower()}{error['msg'][1:]}"


_BOUNDS = {
    "greater_than": ("it must be more than {}", "gt"),
    "greater_than_equal": ("it must be at least {}", "ge"),
    "less_than": ("it must be less than {}", "lt"),
    "less_than_equal": ("it must be at most {}", "le"),
}
_SIZES = {
    "too_short": ("entries; at least {} is needed", "min_length"),
    "too_long": ("entries; at most {} are taken", "max_length"),
    "string_too_short": ("characters; at least {} is needed", "min_length"),
    "string_too_long": ("characters; at most {} are taken", "max_length"),
}


def _known(error: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    if model is None or len(error["loc"]) != 1:
        return ""
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(error["loc"][0]), known, 1)
    return f"; perhaps `{near[0]}` is meant" if near else f"; known are {', '.join(known)}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list, tuple)) and value:
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value[: _LONGEST + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
