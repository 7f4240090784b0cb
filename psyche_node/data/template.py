"""A tokenizer folder's chat template: from messages to tokens, and which of them are trained.

The environment is the one transformers renders with (sandboxed Jinja, ``{% generation %}`` marks), so that the tokens
and the mask equal ``apply_chat_template(..., return_assistant_tokens_mask=True)``; a test compares them. Done here with
jinja2 and tokenizers alone, because importing transformers takes longer than preparing the demo's data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from psyche_node.data.errors import BadSample, DataError
from psyche_node.data.formats import Sample

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: notes where what the assistant says begins and ends in the text."""

    tags = frozenset(["generation"])  # type: ignore[assignment]

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []
        environment.extend(generation=self)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class ChatTemplate:
    """The tokenizer and chat template of a Hugging Face folder (``tokenizer.json``, ``chat_template.jinja``).

    Raises:
        DataError: the folder has no fast tokenizer or no chat template, or the template does not parse.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"{folder}/tokenizer.json cannot be read ({error}). Save the tokenizer with transformers' "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(...)`, which writes one"
            ) from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = self._config()
        self.special = {name: _token_text(config.get(name)) for name in _SPECIAL if config.get(name) is not None}
        self.source = self._source(config)
        self.marked = bool(_MARKED.search(self.source))
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._generation: _Generation = environment.generation  # type: ignore[attr-defined]
        try:
            self._template = environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise DataError(
                f"the chat template of {folder} does not parse: {error}. Mend chat_template.jinja"
            ) from error

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, name: str) -> int | None:
        """The id of ``bos_token``, ``eos_token``, ``pad_token`` or ``unk_token``; None if the folder has none."""
        text = self.special.get(name)
        return None if text is None else self.tokenizer.token_to_id(text)

    def render(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the character spans [start, end) that are trained.

        Raises:
            BadSample: the template refuses the conversation, or cannot tell its spans.
        """
        text, spans = self._render(sample, sample.messages, prompt=False)
        if not self.marked or not spans:
            spans = self._prefix_spans(sample, text)
        if len(spans) != len(sample.train):
            if not all(sample.train):
                raise BadSample(
                    sample.where,
                    f"the chat template marks {len(spans)} spans for {len(sample.train)} assistant messages, so it is "
                    "not clear which one `train: false` means",
                    "Use a template with one generation block per assistant message",
                )
            return text, spans
        return text, [span for span, train in zip(spans, sample.train, strict=True) if train]

    def encode(self, samples: Sequence[Sample]) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]]:
        """Return per sample its token ids (L,) and which of them are trained (L,), never the first.

        Raises:
            BadSample: see ``render``.
        """
        rendered = [self.render(sample) for sample in samples]
        encodings = self.tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        result = []
        for encoding, (_, spans) in zip(encodings, rendered, strict=True):
            ids = np.array(encoding.ids, dtype=np.uint32)
            trained = np.zeros(len(ids), dtype=np.bool_)
            for start, end in spans:
                first, last = _tokens_of(encoding, start, end)
                trained[first : last + 1] = True
            trained[:1] = False
            result.append((ids, trained))
        return result

    def _render(
        self, sample: Sample, messages: Sequence[dict[str, Any]], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        self._generation.blocks, self._generation.spans = blocks, spans
        tools = None if sample.tools is None else list(sample.tools)
        context = {**self.special, "messages": list(messages), "tools": tools, "documents": None}
        try:
            for block in self._template.generate(**context, add_generation_prompt=prompt):
                blocks.append(block)
        except Exception as error:  # a template is a program of its own: whatever it raises is about this sample
            raise BadSample(
                sample.where,
                f"the chat template of {self.folder} refuses it: {error}",
                "Change the order or the roles of its messages, or the template",
            ) from error
        return "".join(blocks), spans

    def _prefix_spans(self, sample: Sample, text: str) -> list[tuple[int, int]]:
        """For templates without marks: what rendering one more assistant message adds to the prompt for it."""
        spans = []
        eos = self.special.get("eos_token")
        for index, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._render(sample, sample.messages[:index], prompt=True)
            whole, _ = self._render(sample, sample.messages[: index + 1], prompt=False)
            if not whole.startswith(prompt) or not text.startswith(prompt):
                raise BadSample(
                    sample.where,
                    f"the chat template of {self.folder} has no generation marks and renders message {index} "
                    "differently inside the whole conversation, so its trained tokens cannot be found",
                    "Put {% generation %} and {% endgeneration %} around the assistant's words in the template",
                )
            end = len(whole)
            # ChatML ends a turn with the end token and a line feed; the model is to learn the token, not the line feed.
            if eos is not None and (found := whole.rfind(eos)) >= len(prompt):
                end = found + len(eos)
            while end > len(prompt) and text[:end] != whole[:end]:
                end -= 1
            spans.append((len(prompt), end))
        return spans

    def _config(self) -> dict[str, Any]:
        path = self.folder / "tokenizer_config.json"
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}. Save the tokenizer with transformers") from error
        if not isinstance(config, dict):
            raise DataError(f"{path} is not a JSON object. Save the tokenizer with transformers")
        return config

    def _source(self, config: dict[str, Any]) -> str:
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # named templates, as older folders have them
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise DataError(f"{self.folder} has no chat template. Put one into {path.name}")
        return template


def _tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters [start, end); (0, -1) if no token covers any of them."""
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1
    while end > start and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    return (0, -1) if first is None or last is None else (first, last)


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
