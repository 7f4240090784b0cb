"""From messages to a prompt, by the folder's own chat template."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from psyche_node.generation.errors import GenerationError, PromptError

Message = dict[str, Any]

_PROBE: list[Message] = [{"role": "user", "content": "?"}]


class Prompts:
    """A tokenizer and its chat template.

    Attributes:
        thinks: the template has a switch for reasoning.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._tokenizer, self._where = tokenizer, where
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
    ) -> str:
        """Return the text that the assistant's next message continues.

        ``thinking`` None leaves the switch as the template has it. Templates call the switch ``thinking`` (Hermes,
        DeepSeek) or ``enable_thinking`` (Qwen3); Seed-OSS has a budget, which is 0 when it is off. A template ignores
        what it does not know.

        Raises:
            GenerationError: the folder has no chat template.
            PromptError: the template refuses these messages.
        """
        if not self.has_template:
            raise GenerationError(f"{self._where} has no chat template. Put one into chat_template.jinja")
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "tools": list(tools or ()) or None}
        if thinking is not None:
            options |= {"thinking": thinking, "enable_thinking": thinking}
        if thinking is False:
            options["thinking_budget"] = 0
        try:
            with self._lock:
                return str(self._tokenizer.apply_chat_template(list(messages), **options))
        except Exception as error:  # a template is a program of its own: whatever it raises is about these messages
            raise PromptError(
                f"the chat template of {self._where} refuses this conversation: {error}. "
                "Change the order or the roles of its messages, or the template"
            ) from error

    def encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """Return the token ids of a rendered prompt; ``special`` adds what plain text lacks, such as ``bos_token``."""
        with self._lock:
            return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _differs(self) -> bool:
        try:
            return self.render(_PROBE, thinking=True) != self.render(_PROBE, thinking=False)
        except PromptError:
            return False
