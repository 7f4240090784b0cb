"""Conversations from records: OpenAI ``messages``, ShareGPT ``conversations``, or ``prompt`` and ``completion``.

Every record is one sample or an error that names the file and the record; nothing is passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from psyche_node.data.errors import BadSample
from psyche_node.data.readers import decode

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
    "a sample is an object with `messages`, `conversations` (ShareGPT), `prompt` and `completion`, `text`, "
    "or `input_ids`"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation.

    ``messages`` are as the chat template takes them. ``train`` says for each assistant message whether its tokens are
    trained (a message may carry ``"train": false``). ``key`` is what the held-out split hashes: the sample's ``group``
    if it has one (samples of a group stay together), else its conversation. ``where`` is ``file:line``.
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    tools: tuple[Any, ...] | None
    key: bytes
    where: str


def parse_sample(line: bytes, where: str) -> Sample:
    """Return the sample of one JSON line. Raises BadSample."""
    return parse_record(decode(line, where), where)


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
        raise BadSample(where, f"no known format: the keys are {found}", f"Note that {_KNOWN}")
    train = tuple(bool(m.pop("train", True)) for m in messages if m["role"] == "assistant")
    if not any(train):
        raise BadSample(
            where,
            "there is no assistant message to train on",
            "Add one (a `gpt` turn, or a completion), or remove the line",
        )
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadSample(where, f"`tools` is {_kind(tools)}", "Make it a list of tool descriptions")
    group = record.get("group")
    if group is not None and not isinstance(group, str):
        raise BadSample(where, f"`group` is {_kind(group)}", "Make it a string; samples of one group stay together")
    key = group if group is not None else json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return Sample(tuple(messages), train, None if tools is None else tuple(tools), key.encode(), where)


def _messages(value: Any, where: str, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample(where, f"`{field}` is {_described(value)}", "Make it a list with at least one message")
    result = []
    for index, message in enumerate(value):
        at = f"`{field}[{index}]`"
        if not isinstance(message, dict):
            raise BadSample(where, f"{at} is {_kind(message)}", "Make it an object with `role` and `content`")
        role = message.get("role")
        if role not in _ROLES:
            raise BadSample(where, f"{at} has the role {role!r}", f"Use one of {', '.join(sorted(_ROLES))}")
        _check_train(message, at, where)
        content = _content(message.get("content"), at, where, optional=bool(message.get("tool_calls")))
        result.append({**message, "content": content})
    return result


def _sharegpt(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadSample(where, f"`conversations` is {_described(value)}", "Make it a list with at least one turn")
    result = []
    for index, turn in enumerate(value):
        at = f"`conversations[{index}]`"
        if not isinstance(turn, dict):
            raise BadSample(where, f"{at} is {_kind(turn)}", "Make it an object with `from` and `value`")
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
        result.append(message)
    return result


def _prompt_part(value: Any, role: str, where: str, field: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _messages(value, where, field)
    return [{"role": role, "content": _content(value, f"`{field}`", where)}]


def _content(value: Any, at: str, where: str, *, optional: bool = False) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    ):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadSample(
            where, f"the content of {at} is {_described(value)}", "Make it a string, or a list of text parts"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSample(
            where, f"the content of {at} has half of a surrogate pair", "Write the text as UTF-8"
        ) from error
    return value


def _check_train(message: dict[str, Any], at: str, where: str) -> None:
    if not isinstance(message.get("train", True), bool):
        raise BadSample(where, f"`train` of {at} is {message['train']!r}", "Make it true or false")


def _described(value: Any) -> str:
    return "missing or null" if value is None else "empty" if value == [] else _kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
