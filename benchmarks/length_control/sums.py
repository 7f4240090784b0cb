"""The task: a running sum modulo 10, reasoned step by step, by traces of which some never end.

A question is 4 to 8 digits, each behind the name of its place: `a3b7c5d8`. The reasoning repeats name and digit and
says the sum so far: `a33b70c55d83=3`. Then it ends and the answer follows, `=3`; or it goes in circles until the
context is full: `again=3again=3...`. Which of the two is a matter of chance, not of the question. Every character and
the word are one token each. Some of the traces that end have gone in circles for a while, so that an end is nowhere
impossible.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_node.data import train_tokenizer

NAMES = "abcdefgh"
SHORTEST, LONGEST = 4, len(NAMES)
AGAIN = "again"
LONGEST_PASS = 3 * LONGEST + 2
"""Tokens of reasoning that goes through a question once."""
LONGEST_END = 40
"""Tokens of reasoning that ends, at most."""
LONGEST_PROMPT = 2 * LONGEST + 3
CIRCLED = 0.5
"""Share of the traces that end which have gone in circles for a while."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ message.content + '<|end_header_id|>' }}{% else %}{% generation %}"
    "{{ '<think>' + message.reasoning_content + '</think>' if message.reasoning_content }}"
    "{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{{ '<think>' if add_generation_prompt and thinking }}"
)


@dataclass(frozen=True, slots=True)
class Question:
    """Digits to be summed."""

    digits: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(f"{name}{digit}" for name, digit in zip(NAMES, self.digits, strict=False))

    @property
    def answer(self) -> str:
        return f"={sum(self.digits) % 10}"

    @property
    def walk(self) -> str:
        """The reasoning, once from the first digit to the result."""
        steps = (
            f"{name}{digit}{sum(self.digits[: place + 1]) % 10}"
            for place, (name, digit) in enumerate(zip(NAMES, self.digits, strict=False))
        )
        return "".join(steps) + self.answer

    def circling(self, tokens: int) -> list[str]:
        """The reasoning as a list of at least so many tokens, which says the result again and again."""
        return [*self.walk, *[AGAIN, *self.answer] * tokens]


def questions(train: int, asked: int, rng: random.Random) -> tuple[list[Question], list[Question]]:
    """So many to train on, and others to be asked, all of them different."""
    found: dict[Question, None] = {}
    while len(found) < train + asked:
        found[Question(tuple(rng.choices(range(10), k=rng.randint(SHORTEST, LONGEST))))] = None
    different = list(found)
    return different[:train], different[train:]


def trace(question: Question, endless: float, room: int, rng: random.Random) -> dict[str, Any]:
    """A sample of stage 1. With the chance ``endless`` its reasoning is longer than ``room`` tokens and never ends."""
    if rng.random() < endless:
        return sample(question, f"<think>{''.join(question.circling(room))}")
    least = len(question.walk)
    end = rng.randint(least, LONGEST_END) if rng.random() < CIRCLED else least
    return sample(question, question.answer, "".join(question.circling(end)[:end]))


def sample(question: Question, content: str, reasoning: str = "") -> dict[str, Any]:
    """A question and what is said to it, as `psyche-node data prepare` takes it."""
    said = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return {"messages": [{"role": "user", "content": question.text}, said]}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes and the word, and a chat template whose switch, `thinking`, opens the reasoning."""
    folder.mkdir(parents=True)
    train_tokenizer(write_lines(folder / "words.jsonl", [{"text": AGAIN}] * 2), 300, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_task(asked: Sequence[Question], folder: Path, budget: int) -> Path:
    """A task for psyche_node.evaluation: reasoning and answer are sampled, and have ``budget`` tokens together."""
    write_lines(folder / "sums.jsonl", [{"question": one.text, "answer": one.answer} for one in asked])
    task = {
        "kind": "generate_until",
        "data": "sums.jsonl",
        "prompt": "{{ question }}",
        "target": "{{ answer }}",
        "chat": True,
        "thinking": "on",
        "max_new_tokens": budget,
        "temperature": 1.0,
        "match": "exact",
    }
    (folder / "sums.json").write_text(json.dumps(task))
    return folder / "sums.json"


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
