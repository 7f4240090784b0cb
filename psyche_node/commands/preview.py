"""How `psyche-node data show` prints: in colour on a terminal, with marks elsewhere, or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from psyche_node.data.preview import Document, Preview, Run
from psyche_node.units import counted, tokens_text

_TRAINED, _MASKED, _CONTROL = "bold green", "bright_black", "underline"
_MARKS = ("⟦", "⟧")
# A data file must not steer the terminal of whoever looks at it.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    [*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


def print_preview(preview: Preview, console: Console) -> None:
    """Print documents between rules, and the sums."""
    coloured = console.is_terminal and not console.no_color
    console.print(Text(preview.title, style="bold"))
    legend = Text.assemble(("trained", _TRAINED), "  ", ("not trained", _MASKED), "  ", ("control token", _CONTROL))
    console.print(legend if coloured else Text(f"{_MARKS[0]}trained{_MARKS[1]}  not trained"))
    for number, document in enumerate(preview.documents):
        name = "padding" if document.padding else f"document {number}"
        plain = counted(document.tokens, "token")
        counts = plain if document.padding else tokens_text(document.tokens, document.trained)
        console.print(Rule(f"{name}: {counts}", align="left", characters="─"))
        if not document.padding:
            console.print(_coloured(document) if coloured else _marked(document), soft_wrap=not coloured)
    console.print(Rule(characters="─"))
    tokens, trained, padding, documents = _sums(preview)
    console.print(
        f"{counted(documents, 'document')}: {tokens_text(tokens, trained)}"
        + (f"; {padding:,} of padding" if padding else "")
    )


def preview_values(preview: Preview) -> dict[str, Any]:
    """The same as a JSON object."""
    tokens, trained, padding, _ = _sums(preview)
    documents = [
        {"tokens": document.tokens, "trained": document.trained, "runs": [asdict(run) for run in document.runs]}
        for document in preview.documents
        if not document.padding
    ]
    return {
        "title": preview.title,
        "tokens": tokens,
        "trained": trained,
        "padding": padding,
        "documents": documents,
    }


def _sums(preview: Preview) -> tuple[int, int, int, int]:
    """Tokens without padding, trained ones, padding, documents."""
    real = [document for document in preview.documents if not document.padding]
    padding = sum(document.tokens for document in preview.documents if document.padding)
    return sum(d.tokens for d in real), sum(d.trained for d in real), padding, len(real)


def _coloured(document: Document) -> Text:
    styles = [(_TRAINED if run.trained else _MASKED) + f" {_CONTROL}" * run.control for run in document.runs]
    return Text.assemble(*zip(map(_shown, document.runs), styles, strict=True))


def _marked(document: Document) -> Text:
    text = Text()
    for trained, runs in groupby(document.runs, key=lambda run: run.trained):
        shown = "".join(map(_shown, runs))
        text.append(f"{_MARKS[0]}{shown}{_MARKS[1]}" if trained else shown)
    return text


def _shown(run: Run) -> str:
    if run.text is None:
        return " ".join(map(str, run.ids)) + " "
    return run.text.translate(_VISIBLE)
