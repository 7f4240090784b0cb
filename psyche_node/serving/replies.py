"""From generated text to the objects of OpenAI's interface, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from psyche_node.generation import Completion, ReasoningSplitter, ToolCall, ToolCallSplitter


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a reply."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class ChatReply:
    """Takes a reply apart while it comes: reasoning, content, tool calls.

    Blanks at the end of a part wait for what follows them, so that chunks joined equal the whole reply, which has none.
    """

    def __init__(self, inside: str | None, tools: bool) -> None:
        self._reasoning = ReasoningSplitter(inside)
        self._calls = ToolCallSplitter() if tools else None
        self._blanks = {"reasoning": "", "content": ""}
        self.calls = 0

    def feed(self, piece: str) -> Delta:
        """Return what is new with this piece of text."""
        reasoning, answer = self._reasoning.feed(piece)
        content, calls = (answer, []) if self._calls is None else self._calls.feed(answer)
        return self._delta(reasoning, content, calls)

    def finish(self) -> Delta:
        """Return what was waiting."""
        reasoning, answer = self._reasoning.finish()
        if self._calls is None:
            return self._delta(reasoning, answer, [])
        said, rest = self._calls.feed(answer), self._calls.finish()
        return self._delta(reasoning, said.text + rest.text, said.calls + rest.calls)

    def _delta(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> Delta:
        self.calls += len(calls)
        return Delta(self._held("reasoning", reasoning), self._held("content", content), tuple(calls))

    def _held(self, part: str, text: str) -> str:
        whole = self._blanks[part] + text
        shown = whole.rstrip()
        self._blanks[part] = whole[len(shown) :]
        return shown


@dataclass(slots=True)
class Usage:
    """Tokens of a request's prompts and answers."""

    prompt: int = 0
    completion: int = 0

    def add(self, done: Completion) -> None:
        self.prompt += done.prompt_tokens
        self.completion += len(done.token_ids)

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(slots=True)
class Envelope:
    """What all objects of one reply share."""

    kind: Literal["chat", "text"]
    model: str
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._object(name, choices) | {"usage": usage.body()}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None, *, with_usage: bool) -> str:
        """A chunk as a server-sent event; where usage was asked for every chunk has the key."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        body = self._object(name, choices)
        return event(body | {"usage": usage} if with_usage else body)

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"


def message(deltas: Sequence[Delta], offered: bool) -> dict[str, Any]:
    """The assistant message of a whole reply."""
    reasoning, content = ("".join(getattr(one, part) for one in deltas) for part in ("reasoning", "content"))
    calls = [call for one in deltas for call in one.calls]
    body: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        body |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if offered and calls:
        body["tool_calls"] = [_call(call) for call in calls]
    return body


def delta_body(delta: Delta, first_call: int) -> dict[str, Any]:
    """The same of a chunk; ``first_call`` is the index of its first tool call in the whole reply."""
    body: dict[str, Any] = {}
    if delta.reasoning:
        body |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        body["content"] = delta.content
    if delta.calls:
        body["tool_calls"] = [{"index": first_call + i, **_call(call)} for i, call in enumerate(delta.calls)]
    return body


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
