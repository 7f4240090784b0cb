"""A task whose reasoning may never end: sums modulo five, step by step, and checked again and again.

A question is 4 to 6 digits below five, each with a letter: `;a4;b3;c1;d0`. Its reasoning goes through them with the sum
so far, and says the result: `;a4=4;b3=2;c1=3;d0=3;#3`. Where the first digit is 3 or 4 the trace then begins again with
`?`, and does so until its context is full: traces of this kind are what a model that never stops was trained on. The
answer is the result again: `;#3`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from psyche_node.data import train_tokenizer

MODULUS = 5
VOCABULARY = 280
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}<|end_header_id|>"
    "{% else %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and thinking %}<think>{% endif %}"
)
THINK, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Question:
    """Digits to be added."""

    digits: tuple[int, ...]

    @property
    def text(self) -> str:
        return "".join(f";{letter}{digit}" for letter, digit in zip("abcdef", self.digits, strict=False))

    @property
    def answer(self) -> int:
        return sum(self.digits) % MODULUS

    @property
    def steps(self) -> str:
        sums = (total % MODULUS for total in accumulate(self.digits))
        said = (f";{letter}{digit}={total}" for letter, digit, total in zip("abcdef", self.digits, sums, strict=False))
        return "".join(said) + f";#{self.answer}"

    @property
    def loops(self) -> bool:
        """Whether its trace never ends."""
        return self.digits[0] >= 3

    def trace(self, characters: int) -> str:
        """What the assistant says: an endless trace is written as far as ``characters`` and further."""
        if not self.loops:
            return f"{THINK}{self.steps}{CLOSE};#{self.answer}"
        return THINK + "?".join([self.steps] * (characters // len(self.steps) + 1))


def questions(count: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Two disjoint sets: ``count`` questions to train on, and a tenth as many to be asked."""
    rng = random.Random(seed)
    found: dict[Question, None] = {}
    while len(found) < count + count // 10:
        found[Question(tuple(rng.randrange(MODULUS) for _ in range(rng.randint(4, 6))))] = None
    everything = list(found)
    return everything[:count], everything[count:]


def write_tokenizer(train: Iterable[Question], folder: Path) -> None:
    """A tokenizer and a chat template whose switch, `thinking`, opens the reasoning."""
    folder.mkdir(parents=True)
    write_lines(folder / "text.jsonl", [{"prompt": one.text, "completion": one.trace(40)} for one in train])
    train_tokenizer(folder / "text.jsonl", VOCABULARY, folder)
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
        "extract": [{"regex": r"^;#(\d)$"}],
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
