"""Chat templates: the sandboxed Jinja that transformers renders with, and where ``{% generation %}`` blocks fall."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from psyche_node.data.errors import DataError
from psyche_node.data.files import read_object
from psyche_node.folder_files import CONFIG, TEMPLATE

SHIPPED = ("hermes-llama3", "chatml")
"""Templates that come with this package."""
SAVE = "Save the tokenizer with transformers"
"""What to do about a damaged one."""
_FOLDER = Path(__file__).parent / "templates"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CONTROL = re.compile(r"<\|\w+\|>")


class Span(NamedTuple):
    """The characters [start, end) of a text."""

    start: int
    end: int


class Template:
    """A compiled chat template.

    Attributes:
        marked: it has generation blocks.
        converses: it uses the messages of a conversation.
        reasons: it renders the field ``reasoning_content`` of a message.
        controls: the control tokens that a shipped template needs; empty for any other.

    Raises:
        DataError: it does not parse; ``where`` is for the message.
    """

    def __init__(self, source: str, where: str, *, shipped: bool = False) -> None:
        self.source, self.where = source, where
        self.marked = bool(_MARKED.search(source))
        self.reasons = "reasoning_content" in source
        self.controls = frozenset(_CONTROL.findall(source)) if shipped else frozenset()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        # transformers offers `strftime_now`, too. Without it, templates fall back to a date of their own, and data
        # prepared today has the bytes of data prepared tomorrow.
        self._generation: _Generation = environment.generation  # type: ignore[attr-defined]
        try:
            parsed = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where} does not parse: {str(error).rstrip('.')}. Mend it") from error
        self.converses = any(name.name == "messages" for name in parsed.find_all(jinja2.nodes.Name))

    def render(self, context: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """Return the text, and what its generation blocks cover. Raises whatever the template does."""
        blocks: list[str] = []
        spans: list[Span] = []
        self._generation.blocks, self._generation.spans = blocks, spans
        for block in self._template.generate(**context):
            blocks.append(block)
        return "".join(blocks), spans


def find_template(name: str) -> Template:
    """Return a shipped template by its name, or the one in a file. Raises DataError."""
    path = _FOLDER / f"{name}.jinja" if name in SHIPPED else Path(name)
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the chat template {name} cannot be read ({error}). Name a file, or one of {', '.join(SHIPPED)}"
        ) from error
    template = Template(source, f"the chat template {name}", shipped=name in SHIPPED)
    if not template.converses:
        raise DataError(
            f"{name} is no chat template: it does not use `messages`. Name a Jinja file, or one of {', '.join(SHIPPED)}"
        )
    return template


def own_source(folder: Path) -> str | None:
    """Return the text of a tokenizer folder's own template; None if it has none. Raises DataError: it is unreadable."""
    path, config = folder / TEMPLATE, folder / CONFIG
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read ({error}). Copy it again") from error
    template = read_object(config, SAVE).get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # named templates, as older folders have them
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: notes where what the assistant says begins and ends in the text."""

    tags = frozenset(["generation"])  # type: ignore[assignment]

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[Span] = []
        environment.extend(generation=self)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        start = sum(map(len, self.blocks))
        self.spans.append(Span(start, start + len(text)))
        return text


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
