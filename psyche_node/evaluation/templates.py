"""Jinja in a sandbox: the fields of an example become a prompt, a list of choices, an answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
import jinja2.sandbox

from psyche_node.evaluation.errors import TaskError

_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


def check_template(template: str) -> str:
    """Return the template if it parses. Raises ValueError."""
    try:
        _compiled(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the template {template!r} does not parse: {error}") from error
    return template


def check_expression(expression: str) -> str:
    """Return the expression if it parses. Raises ValueError."""
    try:
        _expression(expression)
    except jinja2.TemplateError as error:
        raise ValueError(f"the expression {expression!r} does not parse: {error}") from error
    return expression


def render(template: str, fields: Mapping[str, Any], where: str) -> str:
    """Return the text of a template. Raises TaskError, naming the example, for a field that is not there."""
    try:
        return _compiled(template).render(fields)
    except Exception as error:  # a template is a program of its own: whatever it raises is about this example
        raise _refused(template, fields, where, error) from error


def listed(expression: str, fields: Mapping[str, Any], where: str) -> list[str]:
    """Return the list of texts that an expression gives. Raises TaskError, also for what is no list or empty."""
    try:
        values = _expression(expression)(**fields)
        if isinstance(values, str | Mapping) or not hasattr(values, "__iter__"):
            raise TypeError(f"it gives {values!r:.80}, not a list")
        result = [str(value) for value in values]
    except Exception as error:
        raise _refused(expression, fields, where, error) from error
    if not result:
        raise TaskError(f"{where}: {expression!r} gives an empty list. Mend the example or the task")
    return result


@cache
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


@cache
def _expression(expression: str) -> Any:
    return _ENVIRONMENT.compile_expression(expression, undefined_to_none=False)


def _refused(source: str, fields: Mapping[str, Any], where: str, error: Exception) -> TaskError:
    known = ", ".join(sorted(map(str, fields))[:12]) or "none"
    return TaskError(f"{where}: {source!r} cannot be rendered: {error}. The example's fields are {known}")
