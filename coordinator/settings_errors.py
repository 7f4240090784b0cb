"""What is wrong with settings, in words for who wrote them: key, value, where it is from, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from pydantic import BaseModel, ValidationError

Sources = Sequence[tuple[str, Mapping[str, Any]]]
"""Names of where settings are from, and the tables there; those that win come first."""

_WHOLE, _NUMBER = "has to be a whole number", "has to be a number"
_ALLOWED: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "greater_than_equal": lambda c: f"has to be at least {c['ge']}",
    "greater_than": lambda c: f"has to be above {c['gt']}",
    "less_than_equal": lambda c: f"has to be at most {c['le']}",
    "less_than": lambda c: f"has to be below {c['lt']}",
    "literal_error": lambda c: f"has to be {c['expected']}",
    "int_type": lambda c: _WHOLE,
    "int_parsing": lambda c: _WHOLE,
    "int_from_float": lambda c: _WHOLE,
    "float_type": lambda c: _NUMBER,
    "float_parsing": lambda c: _NUMBER,
    "finite_number": lambda c: "has to be a finite number",
    "bool_type": lambda c: "has to be true or false",
    "bool_parsing": lambda c: "has to be true or false",
    "string_type": lambda c: "has to be text, in quotes",
    "string_too_short": lambda c: f"has to have at least {c['min_length']} characters",
    "string_too_long": lambda c: f"has to have at most {c['max_length']} characters",
    "string_pattern_mismatch": lambda c: "has to be 32 bytes in hex: 64 digits",
    "model_type": lambda c: "has to be a section with keys of its own",
}


def explain(error: ValidationError, model: type[BaseModel], section: str, sources: Sources = ()) -> list[str]:
    """A line for each thing that is wrong with settings of ``model``, whose keys stand in ``section``."""
    return [_line(cast(Mapping[str, Any], one), model, section, sources) for one in error.errors()]


def _line(one: Mapping[str, Any], model: type[BaseModel], section: str, sources: Sources) -> str:
    path = [str(part) for part in one["loc"]]
    key, kind = ".".join(filter(None, (section, *path))) or "settings", one["type"]
    if kind == "missing":
        return f"{key} is missing"
    origin = next((f" ({name})" for name, table in sources if path and has(table, path)), "")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys(model, path[:-1]), 1)
        return f"{key} is no setting{origin}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "value_error":
        return f"{key}{origin}: {one['ctx']['error']}"
    allowed = _ALLOWED.get(kind)
    rule = one["msg"] if allowed is None else f"it {allowed(one.get('ctx', {}))}"
    return f"{key} is {one['input']!r}{origin}: {rule}"


def has(table: Mapping[str, Any], path: Sequence[str]) -> bool:
    """Whether there is a value at ``path`` in tables of tables."""
    for part in path:
        if not isinstance(table, Mapping) or part not in table:
            return False
        table = table[part]
    return True


def _keys(model: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = None if field is None else field.annotation
    return list(getattr(model, "model_fields", {}))
