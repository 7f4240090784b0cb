"""A task whose reasoning may never end: a walk over 23 numbers, step by step, and checked again and again.

A question is a number of steps and a start: `n3;5`. Each step takes x to (7x + 13) mod 23, and the reasoning counts
them: `;1=2;2=4;3=18;#18 ok`. Where there are 6 steps or more the trace then begins again with `?`, and does so until
its context is full: traces of this kind are what a model that never stops was trained on. The answer is the result once
more: `;#18`. How often `ok` is said is chance, so that the answer has to be looked up.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from psyche_node.data import train_tokenizer

NUMBERS = 23
VOCABULARY = 420
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}<|end_header_id|>"
    "{% else %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and thinking %}<think>{% endif %}"
)
THINK, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Question:
    """A walk of ``steps`` steps from ``start``."""

    steps: int
    start: int

    @property
    def text(self) -> str:
        return f"n{self.steps};{self.start}"

    @property
    def walk(self) -> list[int]:
        places = [self.start]
        for _ in range(self.steps):
            places.append((7 * places[-1] + 13) % NUMBERS)
        return places[1:]

    @property
    def answer(self) -> str:
        return f";#{self.walk[-1]}"

    @property
    def loops(self) -> bool:
        """Whether its trace never ends."""
        return self.steps >= 6

    def trace(self, characters: int, rng: random.Random) -> str:
        """What the assistant says: an endless trace is written as far as ``characters`` and further."""
        said = "".join(f";{number}={place}" for number, place in enumerate(self.walk, 1)) + self.answer
        checked = f"{said}{' ok' * rng.randint(0, 4)}"
        if not self.loops:
            return f"{THINK}{checked}{CLOSE}{self.answer}"
        return THINK + "?".join([checked] * (characters // len(checked) + 1))


def questions(seed: int) -> tuple[list[Question], list[Question]]:
    """All of them, three quarters to train on and the rest to be asked."""
    everything = [Question(steps, start) for steps in range(2, 10) for start in range(NUMBERS)]
    random.Random(seed).shuffle(everything)
    asked = len(everything) // 4
    return everything[asked:], everything[:asked]


def write_tokenizer(lines: Iterable[object], folder: Path) -> None:
    """A tokenizer and a chat template whose switch, `thinking`, opens the reasoning."""
    folder.mkdir(parents=True)
    train_tokenizer(write_lines(folder / "text.jsonl", lines), VOCABULARY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_task(asked: Iterable[Question], folder: Path, name: str, budget: int) -> Path:
    """A task for psyche_node.evaluation: answered with reasoning, in ``budget`` tokens at most."""
    write_lines(folder / f"{name}.jsonl", [{"question": one.text, "answer": one.answer} for one in asked])
    task = {
        "name": name,
        "kind": "generate_until",
        "data": f"{name}.jsonl",
        "prompt": "{{ question }}",
        "target": "{{ answer }}",
        "chat": True,
        "thinking": "on",
        "max_new_tokens": budget,
        "match": "exact",
    }
    (folder / f"{name}.json").write_text(json.dumps(task))
    return folder / f"{name}.json"


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
