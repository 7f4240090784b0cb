"""From messages to a prompt, by the folder's own chat template."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError

from psyche_node.data.formats import switched
from psyche_node.data.marked import QUOTE, holds_mark, mark_spellings, spells, strip_marks
from psyche_node.data.textcoding import TextCoder
from psyche_node.data.tooling import ToolSupport, needs_tools, tool_support
from psyche_node.folder_files import TEMPLATE
from psyche_node.generation.errors import GenerationError, PromptError

Message = dict[str, Any]

_PROBE: list[Message] = [{"role": "user", "content": "?"}]


class Prompt(NamedTuple):
    """A rendered conversation; ``quoted`` are places inside spellings of control tokens that are text (ascending)."""

    text: str
    quoted: Sequence[int]


class Prompts:
    """A tokenizer and its chat template.

    Control tokens come from the template: one that is spelled in a message is text, as in the data that models are
    trained on, and by the same functions.

    Attributes:
        thinks: the template has a switch for reasoning.

    Raises:
        GenerationError: the tokenizer is not one of the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._tokenizer, self._where = tokenizer, where
        if not tokenizer.is_fast:
            raise GenerationError(
                f"the tokenizer of {where} is a {type(tokenizer).__name__}, which has no tokenizer.json. Convert it to "
                "a fast tokenizer, and save that into the folder"
            )
        self._coder = TextCoder(json.loads(tokenizer.backend_tokenizer.to_str()))
        self._lock = threading.Lock()  # a tokenizer's settings are set anew by each call
        self.thinks = self.has_template and self._differs()

    @property
    def has_template(self) -> bool:
        """Whether the folder has a chat template at all; without one it can still complete text."""
        return self._tokenizer.chat_template is not None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> Prompt:
        """Return what the assistant's next message continues.

        ``thinking`` None leaves the switch as the template has it; else it is set as in the data (``switched``).

        Raises:
            GenerationError: the folder has no chat template.
            PromptError: the template refuses these messages, drops their tools, or hides which control tokens are
                theirs.
        """
        if not self.has_template:
            raise GenerationError(f"{self._where} has no chat template. Put one into {TEMPLATE}")
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        if thinking is not None:
            options |= switched(thinking)
        offered = list(tools or ()) or None
        if needs_tools(messages, offered) and (dropped := self._tool_support.missing(messages, offered)):
            raise PromptError(
                f"the conversation has {dropped}, and the chat template of {self._where} does not write them. Leave "
                "them out, or use a model whose template does"
            )
        text = _encodable(self._fill(messages, offered, options))
        if not spells(messages, offered, self._coder.spelled):
            return Prompt(text, ())
        if holds_mark(text):
            raise PromptError("a message holds a noncharacter, U+FDD0 to U+FDD2. Remove it")
        stripped, places = strip_marks(self._fill(*mark_spellings(messages, offered, self._coder.spelled), options))
        if stripped != text:
            raise PromptError(
                f"the chat template of {self._where} changes the messages in a way that hides where a control token "
                "is spelled. Spell none"
            )
        return Prompt(text, places[QUOTE])

    @cached_property
    def _tool_support(self) -> ToolSupport:
        return tool_support(
            lambda messages, tools: self._fill(messages, tools, {"add_generation_prompt": False, "tokenize": False})
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a rendered conversation."""
        (coded,) = self._coder.encode([prompt.text], [prompt.quoted])
        return tuple(coded.ids)

    def encode_text(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return the token ids of plain text, in which control tokens may be spelled; ``special`` adds what plain text
        lacks, such as ``bos_token``. Raises PromptError if it is no text."""
        with self._lock:
            return tuple(self._tokenizer.encode(_encodable(text), add_special_tokens=special))

    def _fill(self, messages: Sequence[Message], tools: Any, options: dict[str, Any]) -> str:
        try:
            with self._lock:
                return str(self._tokenizer.apply_chat_template(list(messages), tools=tools, **options))
        except TemplateSyntaxError as error:
            said = str(error).rstrip(".")
            raise GenerationError(
                f"the chat template of {self._where} does not parse, line {error.lineno}: {said}. Mend {TEMPLATE}"
            ) from error
        except Exception as error:  # a template is a program of its own: whatever it raises is about these messages
            raise PromptError(
                f"the chat template of {self._where} refuses this conversation: {str(error).rstrip('.')}. "
                "Change the order or the roles of its messages, or the template"
            ) from error

    def _differs(self) -> bool:
        try:
            return self.render(_PROBE, thinking=True) != self.render(_PROBE, thinking=False)
        except PromptError:
            return False


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # from JSON's escapes, or from bytes that were no UTF-8
        raise PromptError(
            "the prompt has half of a surrogate pair, which is no character. Send valid Unicode"
        ) from None
    return text
