"""Both stages, the baselines, and what each model says to held-out questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from benchmarks.length_control.answers import answers, exact_match, think
from benchmarks.length_control.stages import LENGTH, Stage, mixed, overlong_samples, recent, train
from benchmarks.length_control.sums import Question, questions, trace, write_lines, write_task, write_tokenizer
from psyche_node.data import Manifest
from psyche_node.data.prepare import prepare
from psyche_node.evaluation import Measure, Subject, TaskResult, open_tasks, run_suite
from psyche_node.evaluation.steps import finish
from psyche_node.training import make_demo_model

MODEL = {
    "model_type": "seed_oss",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 192,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
FIRST = Stage("hermes-sft", rounds=1000, rate=0.002, batch=32, topk=512)
SECOND = Stage("length-control", rounds=60, rate=0.0003, batch=32, topk=512)
"""Its rate is 0.15 of stage 1's (recipes: 0.4): a model that is pushed too hard ends reasoning that is not through."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done."""

    seed: int = 0
    known: int = 20_000
    """Questions to train on."""
    asked: int = 500
    """Held-out questions."""
    endless: float = 0.5
    """Share of the traces that never end."""
    sampled: int = 1000
    """Questions of the training set that stage 1's model is asked for stage 2."""
    budget: int = 40
    """Tokens of reasoning that stage 2 teaches to end at; once through the longest question takes 26."""
    room: int = 48
    """Tokens that an evaluated answer may have, reasoning included: what uses them up is overlong."""
    first: Stage = FIRST
    second: Stage = SECOND


class Figures(BaseModel):
    """What was found."""

    parameters: int
    budget: int
    room: int
    endless_traces: float
    """Share of stage 1's traces that never end."""
    sampled: int
    """Questions asked for stage 2."""
    overlong: int
    """Answers to them that did not end: the samples that are mixed with stage 1's."""
    cut: int
    """Samples of stage 2, mixed-in ones included, of which only the end of the reasoning and the end token count."""
    samples: int
    """All samples of stage 2."""
    trained_tokens: int
    rounds: tuple[int, int]
    final_loss: float
    """Of stage 1's last 20 rounds."""
    closed_by_force: Measure
    """Exact match of stage 1's model where its reasoning is ended at the budget."""
    models: dict[str, TaskResult]
    """By model: stage-1, stage-2, continued, unmasked."""

    def value(self, model: str, name: str) -> float:
        return self.models[model].measures[name].value


def run(folder: Path, plan: Plan, say: Callable[[str], None]) -> Figures:
    """Train and measure everything, in an empty ``folder``."""
    rng = random.Random(plan.seed)
    known, asked = questions(plan.known, plan.asked, rng)
    traces = [trace(one, plan.endless, LENGTH, rng) for one in known]
    endless = sum(not one["messages"][1]["reasoning_content"] for one in traces)
    write_tokenizer(folder / "tokenizer")
    count = make_demo_model(MODEL, folder / "tokenizer", folder / "start", plan.seed)

    def prepared(name: str, samples: Sequence[object], length_control: int = 0) -> Manifest:
        lines = write_lines(folder / f"{name}.jsonl", samples)
        out, cut = folder / f"{name}-data", length_control
        return prepare(lines, folder / "tokenizer", out, LENGTH, heldout=0.0, too_long="cut", length_control=cut)

    def trained(name: str, start: str, data: str, stage: Stage) -> list[float]:
        return train(folder / start, folder / f"{data}-data", stage, folder / name, say)

    say(f"stage 1: {count:,} parameters, {endless} of {len(traces)} traces never end")
    prepared("traces", traces)
    losses = trained("stage-1", "start", "traces", plan.first)
    overlong = overlong_samples(folder / "stage-1", known[: plan.sampled], plan.budget, plan.seed)
    samples = mixed(overlong, traces, rng)
    manifest = prepared("controlled", samples, plan.budget)
    prepared("unmasked", samples)
    say(
        f"stage 2: {len(overlong)} of {plan.sampled} answers did not end; with as many of stage 1's samples "
        f"{manifest.counts.closed} of {len(samples)} were cut at {plan.budget} tokens"
    )
    for name, data in (("stage-2", "controlled"), ("continued", "traces"), ("unmasked", "unmasked")):
        trained(name, "stage-1", data, plan.second)
    task = write_task(asked, folder, plan.room)
    models = {name: measured(folder / name, task) for name in ("stage-1", "stage-2", "continued", "unmasked")}
    return Figures(
        parameters=count,
        budget=plan.budget,
        room=plan.room,
        endless_traces=endless / len(traces),
        sampled=plan.sampled,
        overlong=len(overlong),
        cut=manifest.counts.closed,
        samples=len(samples),
        trained_tokens=manifest.trained_tokens,
        rounds=(plan.first.rounds, plan.second.rounds),
        final_loss=recent(losses),
        closed_by_force=ended_by_force(folder / "stage-1", asked, plan),
        models=models,
    )


def measured(model: Path, task: Path) -> TaskResult:
    """A model's answers to the task, as `psyche-node eval` measures them."""
    (found,) = finish(run_suite(Subject.load(model, "cpu", "float32", LENGTH), open_tasks([task]))).tasks
    return found


def ended_by_force(model: Path, asked: Sequence[Question], plan: Plan) -> Measure:
    """Exact match of a model whose reasoning is ended at the budget."""
    engine = Subject.load(model, "cpu", "float32", LENGTH).engine
    thoughts = think(engine, asked, plan.budget, plan.seed)
    return exact_match(answers(engine, thoughts, plan.budget, plan.seed + len(asked)), asked)
