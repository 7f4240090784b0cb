"""Talking to a model: prompts by its chat template, answers by transformers' own generation.

``Engine`` loads torch and transformers when it is first named; requests, text and the splitting of replies do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psyche_node.generation.errors import GenerationError, PromptError
from psyche_node.generation.reasoning import Parts, ReasoningSplitter, begins_inside, split_reasoning
from psyche_node.generation.request import PLAIN, Advice, Completion, Request
from psyche_node.generation.toolcalls import ToolCall, ToolCallSplitter, split_tool_calls

if TYPE_CHECKING:
    from psyche_node.generation.engine import Engine

__all__ = [
    "PLAIN",
    "Advice",
    "Completion",
    "Engine",
    "GenerationError",
    "Parts",
    "PromptError",
    "ReasoningSplitter",
    "Request",
    "ToolCall",
    "ToolCallSplitter",
    "begins_inside",
    "split_reasoning",
    "split_tool_calls",
]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from psyche_node.generation.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
