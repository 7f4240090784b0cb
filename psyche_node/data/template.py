"""A tokenizer folder and a chat template: from messages to tokens, and which of them are trained.

Tokens and masks equal ``apply_chat_template(..., return_assistant_tokens_mask=True)`` of transformers; a test compares
them. Done here with jinja2 and tokenizers alone, because importing transformers takes longer than preparing the demo's
data.

A token is trained if all of its characters are. One that reaches out of what the assistant said, such as line feeds of
the header and the answer in one token, is never what the model has to say next: a prompt ends with the header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.files import read_object
from psyche_node.data.formats import Sample, check_encodable, switched
from psyche_node.data.marked import BOUND, CLOSE, QUOTE, holds_mark, mark_bounds, mark_spellings, spells, strip_marks
from psyche_node.data.rendering import SAVE, SHIPPED, Span, Template, find_template, own_source
from psyche_node.data.textcoding import Coded, TextCoder
from psyche_node.data.tokenizer import CHAT_TEMPLATE
from psyche_node.data.tooling import ToolSupport, needs_tools, tool_support
from psyche_node.folder_files import CONFIG, TEMPLATE

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_ENDS = ("</think>", "</seed:think>")


class Rendered(NamedTuple):
    """A conversation as text, the characters that are trained, and more that the tokens of it depend on.

    ``spans`` ascend and do not touch. Of each in ``ends`` only its last token is trained. ``quoted`` are places inside
    spellings of control tokens that are text.
    """

    text: str
    spans: list[Span]
    ends: list[Span]
    quoted: list[int]


class ChatTemplate:
    """The tokenizer of a Hugging Face folder and a chat template: ``chosen``, by default the folder's own.

    ``chosen`` is one of ``rendering.SHIPPED`` or a file.

    Raises:
        DataError: the folder has no fast tokenizer or no chat template, or the template does not parse, or it needs
            control tokens that the tokenizer lacks.
    """

    def __init__(self, folder: Path, chosen: str | None = None) -> None:
        self.folder = folder
        self._coder = TextCoder.read(folder)
        self.tokenizer = self._coder.tokenizer
        config = read_object(folder / CONFIG, SAVE)
        self.special = {name: _token_text(config.get(name)) for name in _SPECIAL if config.get(name) is not None}
        self._template = _own(folder) if chosen is None else find_template(chosen)
        self.source = self._template.source
        self.marked = self._template.marked
        if missing := sorted(c for c in self._template.controls if self.tokenizer.token_to_id(c) is None):
            raise DataError(
                f"the tokenizer {folder} has no token {missing[0]}, which {self._template.where} is made of. Add "
                f"{', '.join(missing)} to it as special tokens, or choose another template"
            )

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return self._coder.vocabulary

    def token_id(self, name: str) -> int | None:
        """The id of ``bos_token``, ``eos_token``, ``pad_token`` or ``unk_token``; None if the folder has none."""
        text = self.special.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def render(self, sample: Sample) -> Rendered:
        """Return the text of a conversation and what of it is trained.

        Raises:
            BadSample: the template refuses the conversation, drops its tools, or cannot tell its spans; or its text
                is no Unicode.
        """
        if needs_tools(sample.messages, sample.tools) and (
            dropped := self._tool_support.missing(sample.messages, sample.tools)
        ):
            raise BadSample(
                sample.where,
                f"it has {dropped}, and {self._template.where} does not write them, so that something else would be "
                "trained than what the sample says",
                "Use a template that does, such as `--template hermes-llama3` or `chatml`",
            )
        text, turns = self._render(sample, sample.messages, prompt=False)
        check_encodable(text, sample.where)
        if not self.marked or not turns:
            turns = self._prefix_spans(sample, text)
        places = self._places(sample, text)
        if len(turns) != len(sample.train):
            if not all(sample.train) or sample.parts or sample.closed:
                raise BadSample(
                    sample.where,
                    f"the chat template marks {len(turns)} spans for {len(sample.train)} assistant messages, so it is "
                    "not clear which one `train` or `spans` means",
                    "Use a template with one generation block per assistant message",
                )
            return Rendered(text, turns, [], places[QUOTE])
        if sample.closed:
            last = sample.messages[-1]
            answered = bool(last["content"] or last.get("tool_calls"))
            end_of_reasoning = self._end_of_reasoning(sample, text, Span(places[CLOSE][0], turns[-1].end))
            return Rendered(text, [end_of_reasoning], turns[-1:] * answered, places[QUOTE])
        bounds = iter(places[BOUND])
        spans: list[Span] = []
        for number, (turn, train) in enumerate(zip(turns, sample.train, strict=True)):
            at = turn.start
            for part in sample.parts.get(number, ()):
                start, end = next(bounds), next(bounds)
                spans += [Span(at, start)] * train + [Span(start, end)] * part.train
                at = end
            spans += [Span(at, turn.end)] * train
        return Rendered(text, _joined(spans), [], places[QUOTE])

    def prompt(self, messages: list[dict[str, Any]]) -> str | None:
        """Return the text of a conversation, up to where the answer to it would begin; None if the template refuses."""
        try:
            return self._template.render(self._context({}, messages, None) | {"add_generation_prompt": True})[0]
        except Exception:  # a template is a program of its own
            return None

    def encode(self, samples: Sequence[Sample]) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
        """Return per sample its token ids (L,) and which of them are trained (L,), never the first.

        Raises:
            BadSample: see ``render``.
        """
        return self.tokenize([self.render(sample) for sample in samples])

    def tokenize(self, rendered: Sequence[Rendered]) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
        """Return what ``encode`` does, of conversations that are rendered."""
        coded = self._coder.encode([one.text for one in rendered], [one.quoted for one in rendered])
        return [(np.array(c.ids, dtype=np.uint32), _mask(c, one)) for c, one in zip(coded, rendered, strict=True)]

    @cached_property
    def _tool_support(self) -> ToolSupport:
        return tool_support(lambda messages, tools: self._template.render(self._context({}, messages, tools))[0])

    @cached_property
    def thinks(self) -> bool:
        """Whether the template has a switch for reasoning: prompts differ by it."""
        probe = [{"role": "user", "content": "?"}]
        asked = [self._context(switched(on), probe, None) | {"add_generation_prompt": True} for on in (True, False)]
        try:
            on, off = map(self._template.render, asked)
            return on != off
        except Exception:  # a template is a program of its own
            return False

    @property
    def where(self) -> str:
        """What messages call the template."""
        return self._template.where

    def switchable(self) -> list[str]:
        """The shipped templates that have the switch, and whose control tokens the tokenizer has."""
        fitting = (
            name
            for name in SHIPPED
            if all(self.tokenizer.token_to_id(one) is not None for one in find_template(name).controls)
        )
        return [name for name in fitting if ChatTemplate(self.folder, name).thinks]

    def _render(self, sample: Sample, messages: Sequence[Any], *, prompt: bool) -> tuple[str, list[Span]]:
        inlined = messages if self._template.reasons else [_inlined(message) for message in messages]
        return self._fill(sample, list(inlined), sample.tools, prompt=prompt)

    def _fill(self, sample: Sample, messages: list[Any], tools: Any, *, prompt: bool) -> tuple[str, list[Span]]:
        context = self._context(sample.options, messages, tools) | {"add_generation_prompt": prompt}
        try:
            return self._template.render(context)
        except Exception as error:  # a template is a program of its own: whatever it raises is about this sample
            raise BadSample(
                sample.where,
                f"{self._template.where} refuses it: {error}",
                "Change the order or the roles of its messages, or the template",
            ) from error

    def _context(self, options: dict[str, Any], messages: list[Any], tools: Any) -> dict[str, Any]:
        return {
            **options,
            **self.special,
            "messages": messages,
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": False,
        }

    def _places(self, sample: Sample, text: str) -> dict[str, list[int]]:
        """Places by mark; see ``marked``. Most samples need none."""
        quotes = spells(sample.messages, (sample.tools, sample.options), self._coder.spelled)
        if not (sample.parts or sample.closed or quotes):
            return {QUOTE: [], BOUND: [], CLOSE: []}
        if holds_mark(text):
            raise BadSample(sample.where, "it holds a noncharacter, U+FDD0 to U+FDD2", "Remove it")
        messages, number, expected = list[Any](), 0, 0
        given: Sequence[Any] = sample.messages
        tools, options = sample.tools, sample.options
        if quotes:  # before spans are marked, whose bounds may lie inside a spelling
            given, (tools, options) = mark_spellings(given, (tools, options), self._coder.spelled)
        for message in given:
            changed = dict(message)
            if message["role"] == "assistant":
                bounds = [place for part in sample.parts.get(number, ()) for place in (part.start, part.end)]
                expected += len(bounds)
                changed["content"] = mark_bounds(message["content"], bounds)
                number += 1
            if sample.closed and message is given[-1]:
                changed["reasoning_content"] += CLOSE
            messages.append(changed)
        if not self._template.reasons:
            messages = [_inlined(message) for message in messages]
        marked, _ = self._fill(replace(sample, options=options), messages, tools, prompt=False)
        stripped, places = strip_marks(marked)
        if stripped != text or len(places[BOUND]) != expected or len(places[CLOSE]) != sample.closed:
            raise BadSample(
                sample.where,
                f"{self._template.where} changes the messages in a way that hides where their parts come to lie",
                "Spell no control token in a message, let spans begin and end at words, or use a simpler template",
            )
        return places

    def _end_of_reasoning(self, sample: Sample, text: str, within: Span) -> Span:
        found = [(at, tag) for tag in _ENDS if (at := text.find(tag, *within)) >= 0]
        if not found:
            raise BadSample(
                sample.where,
                f"{self._template.where} does not close the reasoning of a message",
                f"Use a template that writes {_ENDS[0]} after `reasoning_content`",
            )
        at, tag = min(found)
        return Span(at, at + len(tag))

    def _prefix_spans(self, sample: Sample, text: str) -> list[Span]:
        """For templates without marks: what rendering one more assistant message adds to the prompt for it."""
        spans = []
        eos = self.special.get("eos_token")
        for index, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(sample, sample.messages[:index], prompt=True)
            whole, _ = self._render(sample, sample.messages[: index + 1], prompt=False)
            end = len(whole)
            # ChatML ends a turn with a token and a line feed; the model is to learn the token, not the line feed. What
            # the folder calls its end token may be another one.
            said = whole.rstrip()
            if len(said) > len(prompt) and said.endswith(self._coder.controls):
                end = len(said)
            elif eos is not None and (found := whole.rfind(eos)) >= len(prompt):
                end = found + len(eos)
            while end > len(prompt) and whole[end - 1].isspace() and not text.startswith(whole[:end]):
                end -= 1
            if not whole.startswith(prompt) or not text.startswith(whole[:end]):
                raise BadSample(
                    sample.where,
                    f"{self._template.where} has no generation marks and renders message {index} differently inside "
                    "the whole conversation, so its trained tokens cannot be found",
                    "Put {% generation %} and {% endgeneration %} around the assistant's words in the template",
                )
            spans.append(Span(len(prompt), end))
        return spans


def _own(folder: Path) -> Template:
    source = own_source(folder)
    if source is None:
        raise DataError(f"{folder} has no chat template. Put one into {TEMPLATE}, or choose one with `--template`")
    if source == CHAT_TEMPLATE:  # its folder may be one of a cache, which nobody knows
        return Template(source, "the plain chat template of a tokenizer that is trained on the data")
    return Template(source, f"the chat template of {folder}")


def split_reasoning(content: str) -> tuple[str, str, bool] | None:
    """Return (reasoning, answer, whether it is closed) of content that begins with ``<think>``; None for any other."""
    found = re.match(r"\s*<think>\n?", content)
    if found is None:
        return None
    reasoning, closed, answer = content[found.end() :].partition("</think>")
    return (reasoning.removesuffix("\n") if closed else reasoning), answer.lstrip("\n"), bool(closed)


def _inlined(message: dict[str, Any]) -> dict[str, Any]:
    """The message as templates take it that do not know reasoning."""
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": f"<think>\n{message['reasoning_content']}\n</think>\n{message['content']}"}


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Without empty ones; those that touch become one, so that a token across both is trained."""
    result: list[Span] = []
    for span in spans:
        if span.start >= span.end:
            continue
        if result and result[-1].end == span.start:
            span = Span(result.pop().start, span.end)
        result.append(span)
    return result


def _mask(coded: Coded, rendered: Rendered) -> npt.NDArray[np.bool_]:
    trained = np.zeros(len(coded.ids), dtype=np.bool_)
    for span in rendered.spans:
        inside = coded.inside(*span)
        trained[inside.start : inside.stop] = True
    for span in rendered.ends:
        trained[coded.inside(*span)[-1:]] = True
    trained[:1] = False
    return trained


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)
