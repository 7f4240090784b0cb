"""What clients may ask: the requests of OpenAI's interface, as far as one model on one engine can answer them.

A parameter that would change the answer and is not supported is refused unless it has its neutral value. What OpenAI
knows and changes nothing here (``user``, ``metadata``, ``store``) is ignored; what it does not know either is refused,
as OpenAI does, for a mistyped name would otherwise change nothing without a word.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from coordinator.wording import in_words, place
from psyche_node.serving.errors import ApiError

Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1)]
T = TypeVar("T")
# The first mistake ends the reading of a list: a million of them would take minutes to describe.
Several = Annotated[list[T], Field(min_length=1, max_length=4096, fail_fast=True)]
Few = Annotated[list[T], Field(max_length=128, fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, max_length=1 << 21, fail_fast=True)]

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "prediction": (),
    "moderation": (),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
"""Parameters that are not supported, OpenAI's and other servers', with the values under which they ask for nothing;
null is always one."""

_CHANGES_NOTHING: frozenset[str] = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
"""OpenAI's parameters that are about its own service, or hints."""


_LONGEST_NAME = 64


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Model):
    """A part of a message's content; images and sound are not taken."""

    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    name: str
    arguments: str = "{}"


class PastCall(_Model):
    """A tool call that an assistant message of the history made."""

    function: FunctionCall
    id: str | None = None


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Few[TextPart] | None = None
    name: str | None = None
    tool_calls: Few[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """Return the message as chat templates read it: text as one string, arguments as objects, never null."""
        parts = self.content if isinstance(self.content, list) else []
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "".join(part.text for part in parts) if parts else self.content or "",
        }
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.said_reasoning)):
            raise ApiError(400, f"{where} has no content. Give it a string", param=f"{where}.content")
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id,
                    "function": {"name": call.function.name, "arguments": _arguments(call, where)},
                }
                for call in self.tool_calls
            ]
        optional = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.said_reasoning}
        return message | {name: value for name, value in optional.items() if value is not None}

    @property
    def said_reasoning(self) -> str | None:
        """The reasoning of an earlier answer, under either name."""
        return self.reasoning_content if self.reasoning_content is not None else self.reasoning


class FunctionTool(_Model):
    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Model):
    """A tool on offer; templates may show keys of it that nobody here knows."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: FunctionTool


class StreamOptions(_Model):
    include_usage: bool | None = None


class Reasoning(_Model):
    """Effort is none, or some: the switch that templates have knows no more."""

    enabled: bool | None = None
    effort: str | None = None


class Thinking(NamedTuple):
    """Whether to reason, and the parameter that says so."""

    on: bool
    param: str


class TemplateSwitches(BaseModel):
    """``chat_template_kwargs``: the names that templates have for the one switch there is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    thinking: bool | None = None
    enable_thinking: bool | None = None


class Sampled(_Model):
    """What both kinds of completion share; None: as the folder's generation config advises, else OpenAI's default."""

    shapes: ClassVar[Mapping[str, str]] = {}
    """What parameters are that may be of several kinds, for messages."""

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage_asked(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Several[Message]
    max_completion_tokens: Tokens | None = None
    tools: Few[Tool] | None = None
    tool_choice: Any = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateSwitches | None = None

    @property
    def length(self) -> int | None:
        """Longest answer; the newer name wins."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def thinking(self) -> Thinking | None:
        """Return whether to reason; None leaves it to the template. Raises ApiError if the request says both."""
        switches = self.chat_template_kwargs or TemplateSwitches()
        asked = self.reasoning or Reasoning()
        said = {
            "reasoning": asked.enabled,
            "reasoning.effort": _some(asked.effort),
            "reasoning_effort": _some(self.reasoning_effort),
            "chat_template_kwargs.thinking": switches.thinking,
            "chat_template_kwargs.enable_thinking": switches.enable_thinking,
        }
        wishes = [Thinking(wish, param) for param, wish in said.items() if wish is not None]
        if len({wish.on for wish in wishes}) > 1:
            raise ApiError(400, "the request turns reasoning on and off. Set one of its switches", param="reasoning")
        return wishes[0] if wishes else None

    def offered(self) -> list[dict[str, Any]]:
        """Return the tools the model may call. Raises ApiError for a choice that is not the model's own."""
        if self.tool_choice not in (None, "auto", "none"):
            raise ApiError(
                400,
                "tool_choice may be auto or none here: this server cannot make a model call a tool",
                param="tool_choice",
                code="unsupported_value",
            )
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]


class TextRequest(Sampled):
    """POST /v1/completions; a prompt is text or token ids, and there may be several."""

    shapes: ClassVar[Mapping[str, str]] = {
        "prompt": "it is a string, a list of token ids, or a list of 1 to 4096 strings or of such lists"
    }

    prompt: str | TokenIds | Several[str] | Several[TokenIds]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(one, int) for one in self.prompt):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return self.prompt  # type: ignore[return-value]


Asked = TypeVar("Asked", bound=Sampled)


def parse(kind: type[Asked], body: object) -> Asked:
    """Return the request a JSON body holds. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    known = {*kind.model_fields, *_NEUTRAL, *_CHANGES_NOTHING}
    for name in body.keys() - known:
        near = difflib.get_close_matches(name[:_LONGEST_NAME], sorted(kind.model_fields), 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        raise ApiError(
            400,
            f"Unrecognized request argument supplied: {name[:_LONGEST_NAME]}{hint}",
            param=name[:_LONGEST_NAME],
            code="unknown_parameter",
        )
    for name, neutral in _NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise ApiError(
                400, f"{name} is not supported by this server. Leave it out", param=name, code="unsupported_parameter"
            )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        # Of the kinds a value may have, the one that got furthest is what was meant.
        nearest = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
        where = place(nearest["loc"], nearest["type"])
        words = kind.shapes.get(where.partition("[")[0]) or in_words(nearest)
        raise ApiError(400, f"{where}: {words}", param=where or None) from None


def _some(effort: str | None) -> bool | None:
    return None if effort is None else effort != "none"


def _arguments(call: PastCall, where: str) -> dict[str, Any]:
    try:
        value = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"{where}: the arguments of {call.function.name} are not a JSON object", param=f"{where}.tool_calls"
        )
    return value
