"""What a model says: sampled reasoning, and the answers that it gives when its reasoning is ended by force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.length_control.sums import Question
from psyche_node.evaluation.answers import extract, matches
from psyche_node.evaluation.results import Measure, mean
from psyche_node.generation import Engine
from psyche_node.generation.reasoning import END

ANSWER = 4
"""Tokens that an answer may have; a right one has two, and the end token."""


@dataclass(frozen=True, slots=True)
class Thought:
    """A question, its prompt, which opens the reasoning, and the reasoning that a model went through."""

    question: Question
    prompt: tuple[int, ...]
    reasoning: tuple[int, ...]


def think(engine: Engine, asked: Sequence[Question], room: int, seed: int) -> list[Thought]:
    """Ask each question once, at temperature 1, with ``room`` tokens for reasoning and answer together."""
    (close,) = engine.prompts.encode_text(END)
    prompts = [engine.encode([{"role": "user", "content": one.text}], thinking=True) for one in asked]
    thoughts = []
    for one, prompt, said in zip(
        asked, prompts, engine.generate(prompts, room, temperature=1.0, seed=seed), strict=True
    ):
        ids = said.token_ids
        thoughts.append(Thought(one, prompt, ids[: ids.index(close)] if close in ids else ids))
    return thoughts


def answers(engine: Engine, thoughts: Sequence[Thought], budget: int, seed: int) -> list[str]:
    """What is said after each one's reasoning, which is ended by force after ``budget`` tokens if it goes on."""
    (close,) = engine.prompts.encode_text(END)
    prompts = [(*one.prompt, *one.reasoning[:budget], close) for one in thoughts]
    return [one.text for one in engine.generate(prompts, ANSWER, temperature=1.0, seed=seed)]


def exact_match(said: Sequence[str], asked: Sequence[Question]) -> Measure:
    """The share of right answers, found and compared as `psyche-node eval` does it."""
    return mean(
        [float(matches(extract(["whole"], text), [one.answer], "exact")) for text, one in zip(said, asked, strict=True)]
    )
