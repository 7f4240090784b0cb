"""`psyche-node chat` as people start it: a question, a pipe, a terminal; and what it says when it cannot."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psyche_node import cli
from psyche_node.exits import Exit
from psyche_node.generation import Engine
from psyche_node.generation.conversation import Conversation, Manner
from psyche_node.generation.prompts import Prompt
from psyche_node.sim import cli as sim

Run = Callable[..., tuple[int, str, str]]
ARGUMENTS = ["--device", "cpu", "--max-tokens", "12", "--temperature", "0"]

SWITCHED = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>{% if thinking %}<think>\n{% endif %}"
)


@pytest.fixture
def run(model_folder: Path) -> Run:
    def run(*arguments: str, app: object = cli.app, stdin: str | bytes | None = None) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["chat", *arguments], input=stdin)  # type: ignore[arg-type]
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout, done.stderr

    return run


def test_a_question_and_a_pipe_give_the_same_answer(run: Run, model_folder: Path) -> None:
    code, asked, note = run(str(model_folder), "hello there", *ARGUMENTS)
    assert code == 0
    assert len(asked.strip()) > 3
    assert "cut off after 12 tokens, before its end" in note
    assert run(str(model_folder), *ARGUMENTS, stdin="hello there\n")[:2] == (0, asked)
    assert run(str(model_folder), "hello there", *ARGUMENTS, app=sim.app)[:2] == (0, asked)


def test_an_answer_that_fills_the_context_window_says_so(run: Run, model_folder: Path) -> None:
    code, _, note = run(str(model_folder), "x " * 110, *ARGUMENTS[:2], "--max-tokens", "1000", "--temperature", "0")
    assert code == 0
    assert "the context window is full" in note, note
    assert "--max-tokens" not in note


def test_json_and_seeds(run: Run, model_folder: Path) -> None:
    def ask(*more: str) -> dict[str, object]:
        code, out, _ = run(str(model_folder), "hello", *ARGUMENTS[:4], "--json", "--temperature", "1.5", *more)
        assert code == 0
        values: dict[str, object] = json.loads(out)
        return values

    first = ask("--seed", "3")
    assert first == ask("--seed", "3")
    assert first["answer"] != ask("--seed", "4")["answer"]
    assert (first["finish_reason"], first["completion_tokens"]) == ("length", 12)
    assert first["prompt_tokens"] != ask("--seed", "3", "--system", "Be brief.")["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["."], "hi", Exit.MODEL, "has no config.json"),
        (["{model}"], " \n", Exit.USAGE, "the question is empty"),
        (["{model}", "x " * 400], None, Exit.CONVERSATION, "context window 256"),
        (["{model}", "hi", "--device", "cuda:99"], None, Exit.MODEL, "CUDA devices"),
        (["{model}", "hi", "--device", "tpu"], None, Exit.MODEL, "tpu"),
        (["{model}", "hi", "--temperature", "-1"], None, Exit.USAGE, "temperature"),
    ],
    ids=["folder", "empty", "long", "gpu", "device", "temperature"],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], stdin: str | None, code: Exit, words: str, run: Run, model_folder: Path, tmp_path: Path
) -> None:
    filled = [{".": str(tmp_path), "{model}": str(model_folder)}.get(one, one) for one in arguments]
    done = run(*filled, stdin=stdin)
    assert (done[0], done[1]) == (code, "")
    assert words in done[2]


def test_standard_input_that_is_not_utf8(run: Run, model_folder: Path) -> None:
    code, out, words = run(str(model_folder), *ARGUMENTS, stdin=b"Wie sch\xf6n?")
    assert (code, out) == (Exit.USAGE, "")
    assert "standard input is not UTF-8: byte 7 is 0xf6" in words
    code, out, words = run(str(model_folder), "Wie sch\udcf6n?", *ARGUMENTS)
    assert (code, out, "half of a surrogate pair" in words) == (Exit.CONVERSATION, "", True)


def test_a_switch_that_the_template_lacks_is_named(run: Run, model_folder: Path) -> None:
    code, _, note = run(str(model_folder), "hi", *ARGUMENTS, "--thinking", "on")
    assert code == 0
    assert "has no switch for reasoning" in note


def test_a_conversation_remembers_answers_and_not_reasoning(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.prompts._tokenizer, "chat_template", SWITCHED)
    rendered: list[Prompt] = []
    render = engine.prompts.render

    def note(*arguments: object, **options: object) -> Prompt:
        rendered.append(render(*arguments, **options))  # type: ignore[arg-type]
        return rendered[-1]

    monkeypatch.setattr(engine.prompts, "render", note)
    talk = Conversation(engine, Manner(max_tokens=8, thinking=True, system="Be brief."))
    parts = list(talk.ask("one"))
    assert "".join(part.reasoning for part in parts).strip()
    assert not any(part.answer for part in parts), "cut off while it reasoned"
    talk.think(False)
    answer = "".join(part.answer for part in talk.ask("two"))
    assert answer.strip()
    stopped = talk.ask("never mind")
    next(stopped)
    stopped.close()
    list(talk.ask("three"))
    said = rendered[-1].text
    assert said.startswith("<|start_header_id|>system<|end_header_id|>Be brief.")
    assert "assistant<|end_header_id|><|eot_id|>" in said, "reasoning is forgotten"
    assert f"assistant<|end_header_id|>{answer.strip()}<|eot_id|>" in said
    assert "never mind" not in said
    talk.forget()
    list(talk.ask("four"))
    assert "three" not in rendered[-1].text


def test_on_a_terminal(taught_folder: Path) -> None:
    """A pseudo-terminal on all three: reasoning apart, Ctrl-C in an answer and in a line, a command, Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "psyche_node.cli", "chat", str(taught_folder), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--thinking", "on", "--max-tokens", "20000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        screen = read_until(ours, b"> ")
        os.write(ours, b"why\n")
        screen += read_until(ours, "Because é.".encode()) + read_until(ours, b"> ")
        os.write(ours, b"/new\n")
        screen += read_until(ours, b"> ")
        os.write(ours, b"/thinking off\n")
        screen += read_until(ours, b"> ")
        os.write(ours, b"sing\n")
        screen += read_until(ours, b"la la la")
        process.send_signal(signal.SIGINT)
        screen += read_until(ours, b"(ended)") + read_until(ours, b"> ")
        os.write(ours, b"half a li")
        screen += read_until(ours, b"half a li")
        process.send_signal(signal.SIGINT)
        while not select.select([ours], [], [], 5.0)[0]:
            # Python hears it while it waits for a key, and not in the instant before.
            process.send_signal(signal.SIGINT)
        screen += read_until(ours, b"> ")
        os.write(ours, b"/what\n")
        screen += read_until(ours, b"forgets what was said") + read_until(ours, b"> ")
        os.write(ours, b"\x04")
        assert process.wait(500) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    dimmed = re.findall(rb"\x1b\[2m(.*?)\x1b\[0m", screen.partition(b"> ")[2].partition(b"Because")[0])
    assert b"".join(dimmed) == b"hm, hm"
    assert b"<think>" not in screen
    assert b"Traceback" not in screen


def read_until(terminal: int, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        found += os.read(terminal, 1)
    return found
