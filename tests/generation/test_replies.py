"""Text that comes in pieces is split as the whole text would be: characters, stop strings, reasoning, tool calls."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_node.generation import ReasoningSplitter, ToolCall, ToolCallSplitter, begins_inside, split_reasoning
from psyche_node.generation import split_tool_calls as split_calls
from psyche_node.generation.text import Detokenizer, StopText

BITS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "thi", "nk>", "\n", " ", "a", "bé", '{"name": "f"}']
TEXTS = st.lists(st.sampled_from(BITS), max_size=12).map("".join)
CUTS = st.lists(st.integers(1, 5), max_size=60)


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nwhy\n</think>\n\nBecause.", "why", "Because."),
        ("\n<think>why</think>Because.", "why", "Because."),
        ("Because.", "", "Because."),
        ("<think>why, and then", "why, and then", ""),
        ("I <think>hm</think> so", "", "I <think>hm</think> so"),
        ("<seed:think>why</seed:think>Because.", "why", "Because."),
        ("<thin ice", "", "<thin ice"),
        ("", "", ""),
    ],
    ids=["usual", "blank", "none", "cut-off", "in-the-answer", "seed", "almost", "empty"],
)
def test_reasoning(text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text) == (reasoning, answer)


def test_reasoning_that_began_in_the_prompt() -> None:
    assert begins_inside("...assistant\n<think>\n") == "<think>"
    assert begins_inside("...assistant\n<think>\n\n</think>\n\n") is None
    assert split_reasoning("why</think>\nBecause.", "<think>") == ("why", "Because.")


@given(TEXTS, CUTS, st.sampled_from([None, "<think>"]))
def test_reasoning_in_pieces(text: str, sizes: list[int], inside: str | None) -> None:
    splitter = ReasoningSplitter(inside)
    parts = [splitter.feed(piece) for piece in cut(text, sizes)] + [splitter.finish()]
    found = "".join(part.reasoning for part in parts).strip(), "".join(part.answer for part in parts).strip()
    assert found == split_reasoning(text, inside)


def test_tool_calls() -> None:
    body = '\n{"name": "look", "arguments": {"at": "Bé", "n": 2}}\n'
    text = f"Let me see.\n<tool_call>{body}</tool_call>\n<tool_call>{{'name'}}</tool_call>"
    said = split_calls(text)
    assert said.calls == [ToolCall("look", '{"at": "Bé", "n": 2}')]
    assert said.text == "Let me see.\n\n<tool_call>{'name'}</tool_call>", "what is no call stays text"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"name": "f", "arguments": {}}', [ToolCall("f", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
        ('<tool_call>{"name": "f", "argu', []),
        ('<tool_call>{"name": 1}</tool_call>', []),
        ("<tool_call>[]</tool_call>", []),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', []),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", []),
    ],
    ids=["not-closed", "no-arguments", "cut-off", "no-name", "list", "text-arguments", "deep"],
)
def test_odd_tool_calls(text: str, calls: list[ToolCall]) -> None:
    said = split_calls(text)
    assert said.calls == calls
    assert bool(said.text) is not bool(calls)


@given(TEXTS, CUTS)
def test_tool_calls_in_pieces(text: str, sizes: list[int]) -> None:
    splitter = ToolCallSplitter()
    said = [splitter.feed(piece) for piece in cut(text, sizes)] + [splitter.finish()]
    whole = split_calls(text)
    assert "".join(one.text for one in said).strip() == whole.text
    assert [call for one in said for call in one.calls] == whole.calls
    assert all(json.loads(call.arguments) == {} for call in whole.calls)


@given(TEXTS, CUTS, st.lists(st.sampled_from(["</think>", "a<", "nk>\n", "é"]), max_size=3))
def test_stop_strings_in_pieces(text: str, sizes: list[int], stop: list[str]) -> None:
    watch = StopText(stop)
    shown = "".join(watch.feed(piece) for piece in cut(text, sizes)) + watch.finish()
    assert watch.found == any(mark in text for mark in stop)
    ends = [text.index(mark) for mark in stop if mark in text]
    # Fed in pieces, the stop string that is whole first ends it, which may begin after another's beginning.
    assert text.startswith(shown)
    assert len(shown) == len(text) if not ends else len(shown) >= min(ends)


@given(st.text(max_size=30), st.booleans())
def test_characters_of_several_tokens(text: str, space: bool) -> None:
    """Tokens are single bytes here, and one decoder drops the space that a text begins with, as some do."""

    def decode(ids: Sequence[int]) -> str:
        whole = bytes(ids).decode(errors="replace")
        return whole.removeprefix(" ") if space else whole

    words = Detokenizer(decode)
    pieces = [words.feed(byte) for byte in text.encode()]
    assert "".join(pieces) + words.finish() == decode(text.encode())
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_half_a_character_at_the_end() -> None:
    words = Detokenizer(lambda ids: bytes(ids).decode(errors="replace"))
    assert [words.feed(byte) for byte in "a€".encode()[:3]] == ["a", "", ""]
    assert words.finish() == "\ufffd"


def test_calls_with_half_of_a_surrogate_pair_can_be_sent() -> None:
    """Models write JSON's escapes, of which JSON takes any."""
    (call,) = split_calls('<tool_call>{"name": "f", "arguments": {"a": "\\ud83d é"}}</tool_call>').calls
    assert call.arguments.encode() == b'{"a": "\\ud83d \\u00e9"}'
    named = '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'
    assert split_calls(named) == (named, [])
