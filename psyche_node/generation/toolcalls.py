"""Tool calls as Hermes models write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from psyche_node.generation.text import may_begin

BEGIN, END = "<tool_call>", "</tool_call>"
MARKS = (BEGIN, END)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model asks for; ``arguments`` is a JSON object as text, as OpenAI's interface has it."""

    name: str
    arguments: str


class Said(NamedTuple):
    """Plain text, and the calls that were in it."""

    text: str
    calls: list[ToolCall]


def split_tool_calls(text: str) -> Said:
    """Return the text without its tool calls, and the calls. What is not a well-formed call stays text."""
    splitter = ToolCallSplitter()
    first, rest = splitter.feed(text), splitter.finish()
    return Said((first.text + rest.text).strip(), first.calls + rest.calls)


class ToolCallSplitter:
    """Takes the calls out of a reply while it comes; a call waits until it is whole."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> Said:
        """Return what is new: text, and calls that are whole now."""
        self._held += piece
        text, calls = "", list[ToolCall]()
        while True:
            before, begin, after = self._held.partition(BEGIN)
            if not begin:
                size = len(before) - may_begin(before, [BEGIN])
                text, self._held = text + before[:size], before[size:]
                return Said(text, calls)
            text += before
            body, end, rest = after.partition(END)
            if not end:
                self._held = begin + after
                return Said(text, calls)
            self._held = rest
            call = _parse(body)
            if call is None:
                text += begin + body + end
            else:
                calls.append(call)

    def finish(self) -> Said:
        """Return what was waiting. A call without its closing mark counts if its JSON is whole."""
        held, self._held = self._held, ""
        call = _parse(held.removeprefix(BEGIN)) if held.startswith(BEGIN) else None
        return Said(held, []) if call is None else Said("", [call])


def _parse(body: str) -> ToolCall | None:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    name, text = value["name"], json.dumps(arguments, ensure_ascii=False)
    if not _is_unicode(name):
        return None
    # JSON can escape half of a surrogate pair, which is no character: it stays escaped.
    return ToolCall(name, text if _is_unicode(text) else json.dumps(arguments))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
