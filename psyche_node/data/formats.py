"""Conversations from records: OpenAI ``messages``, ShareGPT ``conversations``, or ``prompt`` and ``completion``.

Every record is one sample or an error that names the file and the record; nothing is passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psyche_node.data.errors import BadSample

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_ROLES = frozenset(["system", "developer", "user", "assistant", "tool"])
_KNOWN = (
    "A sample is an object with `messages`, `conversations` (ShareGPT), `prompt` and `completion`, `text`, "
    "or `input_ids`"
)


SWITCH = "thinking"
"""The key of a record, and of `Sample.options`, that turns a template's reasoning on or off."""


class Part(NamedTuple):
    """The characters [start, end) of an assistant message's content, and whether they are trained."""

    start: int
    end: int
    train: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation.

    ``messages`` are as the chat template takes them. ``train`` says for each assistant message whether its tokens are
    trained (a message may carry ``"train": false``). ``key`` is what the held-out split hashes: the sample's ``group``
    if it has one (samples of a group stay together), else its conversation. ``where`` is ``file:line``.

    ``parts`` says by assistant message (counted from 0) which parts of its content differ from its ``train``: its
    ``spans``. ``options`` are variables of the template, such as the switch for reasoning. Where it is
    ``closed``, only the end of the last message's reasoning and the end of that message are trained (see
    ``lengthcontrol``).
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    tools: tuple[Any, ...] | None
    key: bytes
    where: str
    parts: dict[int, tuple[Part, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    closed: bool = False


def parse_record(record: dict[str, Any], where: str) -> Sample:
    """Return the conversation of one record. Raises BadSample."""
    if "messages" in record:
        messages = _messages(record["messages"], where, "messages")
    elif "conversations" in record:
        messages = _sharegpt(record["conversations"], where)
    elif "prompt" in record and "completion" in record:
        messages = [
            *_prompt_part(record["prompt"], "user", where, "prompt"),
            *_prompt_part(record["completion"], "assistant", where, "completion"),
        ]
    else:
        found = ", ".join(sorted(map(str, record))[:8]) or "nothing"
        raise BadSample(where, f"no known format: the keys are {found}", _KNOWN)
    said = [message for message in messages if message["role"] == "assistant"]
    train = tuple(bool(message.pop("train", True)) for message in said)
    parts = {number: spans for number, message in enumerate(said) if (spans := message.pop("spans", None))}
    if not any(train) and not any(part.train for spans in parts.values() for part in spans):
        raise BadSample(
            where,
            "there is no assistant message to train on",
            "Add one (a `gpt` turn, or a completion), or remove the line",
        )
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadSample(where, f"`tools` is {kind_of(tools)}", "Make it a list of tool descriptions")
    group = record.get("group")
    if group is not None and not isinstance(group, str):
        raise BadSample(where, f"`group` is {kind_of(group)}", "Make it a string; samples of one group stay together")
    key = group if group is not None else json.dumps(messages, sort_keys=True, ensure_ascii=False)
    tools = None if tools is None else tuple(tools)
    check_encodable(key, where)
    return Sample(tuple(messages), train, tools, key.encode(), where, parts, _options(record, where))


def _messages(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample(where, f"`{field}` is {_described(value)}", "Make it a list with at least one message")
    result = []
    for index, message in enumerate(value):
        at = f"`{field}[{index}]`"
        if not isinstance(message, dict):
            raise BadSample(where, f"{at} is {kind_of(message)}", "Make it an object with `role` and `content`")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadSample(where, f"{at} has the role {role!r}", f"Use one of {', '.join(sorted(_ROLES))}")
        _check_train(message, at, where)
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        optional = bool(message.get("tool_calls") or reasoning)
        content = _content(message.get("content"), at, where, optional=optional)
        kept = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
        if reasoning:
            kept["reasoning_content"] = _content(reasoning, f"the reasoning of {at}", where)
        if kept.get("spans") is not None:
            kept["spans"] = _spans(kept["spans"], content, role, at, where)
        result.append({**kept, "content": content})
    return result


def _spans(value: Any, content: str, role: str, at: str, where: str) -> tuple[Part, ...]:
    """The spans of a message, in order: objects with ``start``, ``end`` and, if not true, ``train``."""
    remedy = 'Write {"start": 0, "end": 5, "train": false}: characters of the content, in order, without overlap'
    if role != "assistant":
        raise BadSample(where, f"{at} has spans, and is from the {role}", "Remove them: only the assistant is trained")
    if not isinstance(value, list):
        raise BadSample(where, f"`spans` of {at} is {kind_of(value)}", remedy)
    parts: list[Part] = []
    for span in value:
        known = isinstance(span, dict) and {"start", "end"} <= span.keys() <= {"start", "end", "train"}
        numbers = known and type(span["start"]) is int and type(span["end"]) is int
        if not numbers or type(span.get("train", True)) is not bool:
            raise BadSample(where, f"`spans` of {at} has {json.dumps(span)}", remedy)
        part = Part(span["start"], span["end"], span.get("train", True))
        after = parts[-1].end if parts else 0
        if not after <= part.start < part.end <= len(content):
            what = f"`spans` of {at} has {json.dumps(span)}, after {after} and within {len(content)} characters"
            raise BadSample(where, what, remedy)
        parts.append(part)
    return tuple(parts)


def _options(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What a record says to the template: its switch for reasoning, by the names that templates have for it."""
    options = record.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise BadSample(where, f"`chat_template_kwargs` is {kind_of(options)}", "Make it an object")
    switch = record.get(SWITCH)
    if switch is not None and not isinstance(switch, bool):
        raise BadSample(where, f"`{SWITCH}` is {kind_of(switch)}", "Make it true or false")
    return ({} if switch is None else switched(switch)) | (options or {})


def switched(on: bool) -> dict[str, Any]:
    """The variables by which templates know the switch for reasoning.

    Templates call it ``thinking`` (Hermes, DeepSeek) or ``enable_thinking`` (Qwen3); Seed-OSS has a budget, which is 0
    when it is off. A template ignores what it does not know.
    """
    return {SWITCH: on, "enable_thinking": on} | ({} if on else {"thinking_budget": 0})


def _sharegpt(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample(where, f"`conversations` is {_described(value)}", "Make it a list with at least one turn")
    result = []
    for index, turn in enumerate(value):
        at = f"`conversations[{index}]`"
        if not isinstance(turn, dict):
            raise BadSample(where, f"{at} is {kind_of(turn)}", "Make it an object with `from` and `value`")
        # Some exports put OpenAI-style messages under this name.
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(sorted(_SHAREGPT_ROLES))
            raise BadSample(where, f"{at} is from {speaker!r}", f"Use one of {known}")
        _check_train(turn, at, where)
        message: dict[str, Any] = {"role": role, "content": _content(text, at, where)}
        if "train" in turn:
            message["train"] = turn["train"]
        if turn.get("spans") is not None:
            message["spans"] = _spans(turn["spans"], message["content"], role, at, where)
        result.append(message)
    return result


def _prompt_part(value: Any, role: str, where: str, field: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _messages(value, where, field)
    return [{"role": role, "content": _content(value, f"`{field}`", where)}]


def _content(value: Any, at: str, where: str, *, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):
        value = "".join(_part(part, f"`[{index}]` of the content of {at}", where) for index, part in enumerate(value))
    if not isinstance(value, str):
        raise BadSample(
            where, f"the content of {at} is {_described(value)}", "Make it a string, or a list of text parts"
        )
    check_encodable(value, where, f"the content of {at}")
    return value


def _part(part: Any, at: str, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    what = "of the type 'text', without a text" if kind == "text" else f"of the type {kind!r:.40}"
    remedy = 'Only text is trained: {"type": "text", "text": "..."}'
    raise BadSample(where, f"{at} is {kind_of(part) if kind is None else what}", remedy)


def check_encodable(text: str, where: str, what: str = "it") -> None:
    """Raises BadSample for text with a character that is none; JSON can escape such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample(where, f"{what} has half of a surrogate pair", "Write the text as UTF-8") from error


def _check_train(message: dict[str, Any], at: str, where: str) -> None:
    if not isinstance(message.get("train", True), bool):
        raise BadSample(where, f"`train` of {at} is {message['train']!r}", "Make it true or false")


def _described(value: Any) -> str:
    return "missing or null" if value is None else "empty" if value == [] else kind_of(value)


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
