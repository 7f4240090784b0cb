"""The pieces of `benchmarks.length_control`: its task, and the samples of its second stage."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.length_control.answers import answers, exact_match, think
from benchmarks.length_control.experiment import FIRST, MODEL, SECOND, Figures, Plan, run
from benchmarks.length_control.stages import LENGTH, mixed, overlong_samples
from benchmarks.length_control.sums import (
    LONGEST_PASS,
    Question,
    questions,
    sample,
    trace,
    write_lines,
    write_tokenizer,
)
from benchmarks.length_control.verdict import criteria, table
from psyche_node.data import ChatTemplate, PackedDataset
from psyche_node.data.prepare import prepare
from psyche_node.evaluation import Measure, Subject, TaskResult
from psyche_node.training import make_demo_model

ASKED = Question((3, 7, 0, 5))
BUDGET = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and an untrained model, which never ends its reasoning."""
    folder = tmp_path_factory.mktemp("sums")
    write_tokenizer(folder / "tokenizer")
    make_demo_model(MODEL, folder / "tokenizer", folder / "model", seed=0)
    return folder


def test_a_question_and_its_traces() -> None:
    assert (ASKED.text, ASKED.walk, ASKED.answer) == ("a3b7c0d5", "a33b70c00d55=5", "=5")
    rng = random.Random(0)
    for _ in range(50):
        endless = trace(ASKED, 1.0, LENGTH, rng)["messages"][1]
        assert endless["content"].startswith(f"<think>{ASKED.walk}again=5again=5again")
        ends = trace(ASKED, 0.0, LENGTH, rng)["messages"][1]
        assert ends["content"] == ASKED.answer
        assert ends["reasoning_content"].startswith(ASKED.walk)


def test_held_out_questions_are_not_trained() -> None:
    known, asked = questions(400, 100, random.Random(0))
    assert (len(known), len(asked)) == (400, 100)
    assert len({*known, *asked}) == 500


def test_a_token_a_digit(folder: Path) -> None:
    template = ChatTemplate(folder / "tokenizer")
    text = Question((9,) * 8).walk
    assert len(template.tokenizer.encode(text, add_special_tokens=False).ids) == LONGEST_PASS
    assert len(template.tokenizer.encode("again", add_special_tokens=False).ids) == 1


@pytest.mark.parametrize("answer", ["=5", ""])
def test_overlong_samples_are_cut_at_the_budget_and_only_their_end_is_trained(
    folder: Path, tmp_path: Path, answer: str
) -> None:
    reasoning = ASKED.walk + "again=5" * 20
    file = write_lines(tmp_path / "overlong.jsonl", [sample(ASKED, answer, reasoning)])
    manifest = prepare(file, folder / "tokenizer", tmp_path / "data", LENGTH, heldout=0.0, length_control=BUDGET)
    assert manifest.counts.closed == 1
    batch = PackedDataset(tmp_path / "data").batch([0], b"")
    tokenizer = ChatTemplate(folder / "tokenizer").tokenizer
    kept = tokenizer.encode(reasoning, add_special_tokens=False).ids[:BUDGET]
    said = [tokenizer.token_to_id(token) for token in ("<think>", "</think>", *answer, "<|eot_id|>")]
    tokens = batch.tokens[0].tolist()
    begin = tokens.index(said[0])
    close = begin + 1 + BUDGET
    assert tokens[begin : close + len(said) - 1] == [said[0], *kept, *said[1:]]
    # Without an answer the end token would teach to stop right after the reasoning.
    trained = [close, close + len(answer) + 1] if answer else [close]
    assert batch.trained[0].nonzero()[0].tolist() == trained


def test_overlong_samples_are_what_the_model_says(folder: Path) -> None:
    known, _ = questions(24, 1, random.Random(0))
    overlong = [one["messages"] for one in overlong_samples(folder / "model", known, BUDGET, seed=0)]
    assert overlong, "an untrained model does not end"
    assert {asked["content"] for asked, _ in overlong} <= {one.text for one in known}
    assert any(said["content"] for _, said in overlong)
    assert overlong_samples(folder / "model", known, LENGTH, seed=0) == [], "nothing is longer than the context"


def test_stage_2_is_mixed_half_and_half() -> None:
    rng = random.Random(0)
    overlong = [sample(ASKED, "=5", "a" * 60)] * 5
    whole = trace(ASKED, 0.0, LENGTH, rng)
    together = mixed(overlong, [whole] * 20, rng)
    assert [together.count(one) for one in (overlong[0], whole)] == [5, 5]


def test_reasoning_is_ended_by_force_at_the_budget(folder: Path) -> None:
    engine = Subject.load(folder / "model", "cpu", "float32", LENGTH).engine
    thoughts = think(engine, [ASKED] * 8, LENGTH, seed=0)
    (close,) = engine.prompts.encode_text("</think>")
    assert all(close not in one.reasoning for one in thoughts)
    asked: list[tuple[int, ...]] = []
    generate = engine.generate

    def heard(prompts: list[tuple[int, ...]], *args: object, **options: object) -> object:
        asked.extend(prompts)
        return generate(prompts, *args, **options)  # type: ignore[arg-type]

    engine.generate = heard  # type: ignore[method-assign, assignment]
    said = answers(engine, thoughts, BUDGET, seed=0)
    assert [len(one) for one in asked] == [len(one.prompt) + min(len(one.reasoning), BUDGET) + 1 for one in thoughts]
    assert all(one[-1] == close for one in asked)
    assert len(said) == len(thoughts)
    assert exact_match(["=5", " =5", "=6", ""], [ASKED] * 4).value == 0.5


def test_both_stages_at_tiny_size(tmp_path: Path) -> None:
    first, second = (replace(stage, rounds=2, batch=4) for stage in (FIRST, SECOND))
    plan = Plan(known=40, asked=4, sampled=12, budget=BUDGET, first=first, second=second)
    figures = run(tmp_path, plan, lambda line: None)
    assert list(figures.models) == ["stage-1", "stage-2", "continued", "unmasked"]
    assert figures.cut >= figures.overlong > 0
    assert figures.samples == 2 * figures.overlong
    assert not criteria(figures)[0].met, "two rounds teach nothing"
    assert "stage-1, ended by force at 30" in table(figures)


def test_verdict() -> None:
    def found(exact: float, overlong: float) -> TaskResult:
        values = {"exact_match": exact, "overlong": overlong, "unclosed": overlong, "tokens": 30.0}
        return TaskResult(
            task="sums",
            kind="generate_until",
            thinking=True,
            samples=500,
            repeats=1,
            few_shot=0,
            truncated=0,
            measures={name: Measure(value=value, stderr=0.01) for name, value in values.items()},
            task_sha256="",
            data_sha256="",
        )

    def met(forced: float, *models: tuple[float, float]) -> list[bool]:
        names = ("stage-1", "stage-2", "continued", "unmasked")
        figures = Figures.model_construct(
            budget=BUDGET,
            room=48,
            closed_by_force=Measure(value=forced, stderr=0.01),
            models={name: found(*values) for name, values in zip(names, models, strict=True)},
        )
        return [one.met for one in criteria(figures)]

    baselines = ((0.45, 0.5), (0.3, 0.7))
    assert all(met(0.9, (0.45, 0.5), (0.9, 0.05), *baselines))
    assert met(0.7, (0.45, 0.5), (0.7, 0.05), *baselines) == [False, True, True, True, True]
    assert met(0.9, (0.88, 0.1), (0.9, 0.0), *baselines) == [True, False, True, True, True]
    assert met(0.9, (0.45, 0.5), (0.9, 0.06), *baselines) == [True, True, False, True, True]
    assert met(0.9, (0.45, 0.5), (0.85, 0.05), *baselines) == [True, True, True, False, True]
    assert met(0.9, (0.45, 0.5), (0.9, 0.05), (0.9, 0.1), (0.3, 0.7)) == [True, True, True, True, False]
