"""`psyche-node chat` (and `psyche-sim chat`): ask a model, or talk with it."""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from coordinator.printable import LINES, printable
from psyche_node.commands.ending import failures
from psyche_node.generation import GenerationError, PromptError
from psyche_node.generation.folder import check_folder
from psyche_node.units import counted

if TYPE_CHECKING:
    from psyche_node.generation.conversation import Conversation

_HELP = (
    "/new forgets what was said, /thinking on|off switches reasoning; Ctrl-C ends an answer or drops a line, Ctrl-D "
    "ends the conversation."
)


class Switch(StrEnum):
    ON = "on"
    OFF = "off"


def chat(
    folder: Annotated[Path, typer.Argument(help="Hugging Face model folder, such as runs/TIME/model.")],
    question: Annotated[
        str | None, typer.Argument(help="What to ask. Without it: a conversation, or standard input if that is piped.")
    ] = None,
    thinking: Annotated[
        Switch | None, typer.Option(help="Reason before the answer; default: as the chat template has it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, reasoning included, in tokens.")] = 1024,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, max=100.0, help="0: the likeliest token. Default: the folder's advice, or 0."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**62, help="Of sampling: the same one gives the same answer.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one answer as a JSON object.")] = False,
) -> None:
    """Ask a model something, or talk with it. Reasoning is shown dimmed, and only on a terminal."""
    interactive = question is None and sys.stdin.isatty()
    if interactive and as_json:
        raise typer.BadParameter("--json prints one answer: give a QUESTION, or pipe one in")
    if question is None and not interactive:
        question = _piped()
    if question is not None and not question.strip():
        raise typer.BadParameter("the question is empty")
    with failures(GenerationError):
        check_folder(folder)
    # Imported late: neither `--help` nor what is refused waits for torch.
    from psyche_node.generation import Engine
    from psyche_node.generation.conversation import Conversation, Manner

    manner = Manner(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=secrets.randbelow(1 << 62) if seed is None else seed,
        system=system,
        thinking=None if thinking is None else thinking is Switch.ON,
    )
    with failures(GenerationError):
        engine = Engine.load(folder, device)
        if thinking is not None and not engine.prompts.thinks:
            _note(f"the chat template of {folder} has no switch for reasoning: --thinking changes nothing")
        conversation = Conversation(engine, manner)
        if question is None:
            _talk(conversation, folder)
        elif as_json:
            _answer_json(conversation, question)
        else:
            _answer(conversation, question, Console(highlight=False))


def _piped() -> str:
    """The question on standard input, which is UTF-8 whatever the locale."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"standard input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Convert it, with "
            "iconv for example"
        ) from None


def _talk(conversation: Conversation, folder: Path) -> None:
    """Read questions from the terminal until Ctrl-D."""
    import readline  # noqa: F401  (editing and history of the input line)

    console = Console(highlight=False)
    console.print(Text(f"{folder}. {_HELP}", style="dim"))
    while True:
        try:
            line = input("> ").strip()  # readline's own prompt: it is still there when a line is edited
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()  # the line is dropped, not the conversation
            continue
        except UnicodeDecodeError:
            console.print(Text("this line is not UTF-8; type it again", style="red"))
            continue
        if line == "/new":
            conversation.forget()
        elif line in ("/thinking on", "/thinking off"):
            conversation.think(line.endswith("on"))
        elif line.startswith("/"):
            console.print(Text(_HELP, style="dim"))
        elif line:
            try:
                _answer(conversation, line, console)
            except KeyboardInterrupt:
                console.print(Text(" (ended)", style="dim"))
            except PromptError as error:
                console.print(Text(f"{error}. /new begins again", style="red"))


def _answer(conversation: Conversation, question: str, console: Console) -> None:
    """Print the answer while it comes: on a terminal with its reasoning, else the answer alone."""
    terminal, reasoned, said = console.is_terminal, False, False
    with closing(conversation.ask(question)) as pieces:
        for parts in pieces:
            if parts.reasoning and terminal:
                console.print(_printable(parts.reasoning, "dim"), end="", soft_wrap=True)
            reasoned |= bool(parts.reasoning)
            if parts.answer and reasoned and terminal and not said:
                console.print("\n")
            said |= bool(parts.answer)
            if parts.answer and terminal:
                console.print(_printable(parts.answer), end="", soft_wrap=True)
            elif parts.answer:
                sys.stdout.write(parts.answer)
                sys.stdout.flush()
    typer.echo()
    completion = conversation.last
    if completion.finish_reason == "length":
        where = "in the middle of its reasoning" if reasoned and not said else "before its end"
        more = "the context window is full" if conversation.full else "--max-tokens allows more"
        _note(f"cut off after {counted(len(completion.token_ids), 'token')}, {where}; {more}")


def _answer_json(conversation: Conversation, question: str) -> None:
    reasoning = answer = ""
    with closing(conversation.ask(question)) as pieces:
        for parts in pieces:
            reasoning, answer = reasoning + parts.reasoning, answer + parts.answer
    completion = conversation.last
    values = {
        "answer": answer.strip(),
        "reasoning": reasoning.strip(),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
    }
    typer.echo(json.dumps(values, ensure_ascii=False))


def _printable(text: str, style: str = "") -> Text:
    """No escape sequence that a model was taught to write reaches a terminal."""
    return Text(printable(text, LINES), style=style)


def _note(text: str) -> None:
    typer.secho(text, dim=True, err=True)
