"""Whether a chat template writes tools, calls and their results, or passes over them without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

_TOOL, _CALL, _RESULT = "probe_tool", "probe_call", "probe_result"


class ToolSupport(NamedTuple):
    """What a template writes of the tools on offer, of an assistant's calls, and of what the tools returned."""

    tools: bool
    calls: bool
    results: bool

    def missing(self, messages: Iterable[Any], tools: Sequence[Any] | None) -> str | None:
        """Return what the template would drop of this conversation: tools, tool calls or tool results; else None."""
        kept = list(messages)
        if tools and not self.tools:
            return "tools"
        if not self.calls and any(one.get("tool_calls") for one in kept):
            return "tool calls"
        if not self.results and any(one["role"] == "tool" for one in kept):
            return "tool results"
        return None


def needs_tools(messages: Iterable[Any], tools: Sequence[Any] | None) -> bool:
    """Whether a conversation has anything that `ToolSupport` is about."""
    return bool(tools) or any(one.get("tool_calls") or one["role"] == "tool" for one in messages)


def tool_support(render: Callable[[list[Any], list[Any]], str]) -> ToolSupport:
    """Try a template out: ``render`` fills it with messages and tools.

    What it refuses counts as written: it says so itself, when it is asked.
    """
    function = {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object", "properties": {}}}
    call = {"id": "probe0000", "type": "function", "function": {"name": _CALL, "arguments": {_CALL: _CALL}}}
    asked = {"role": "user", "content": "?"}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "probe0000", "name": _CALL, "content": _RESULT}
    offered = [{"type": "function", "function": function}]

    def writes(word: str, messages: list[Any]) -> bool:
        try:
            return word in render(messages, offered)
        except Exception:  # a template is a program of its own, and may raise anything
            return True

    return ToolSupport(writes(_TOOL, [asked]), writes(_CALL, [asked, called]), writes(_RESULT, [asked, called, result]))
