"""Length control at small scale: a model whose reasoning often never ends, and a second stage that ends it.

    python -m benchmarks.length_control                 # two cores, under ten minutes
    python -m benchmarks.length_control --out DIR       # and keep models, data and results

Stage 1 trains a model of 1.4 million parameters on walks over numbers, step by step; the traces of half of the
questions never end. Stage 2 is that of the Hermes 4 report: the model answers questions that it was trained on; where
it does not stop within the budget, its reasoning is cut there, and `</think>` and the answer are put behind it. Of
these samples only `</think>` and the end token are trained. They are mixed with samples of stage 1 that
end, as there.

Both stages are trained by two members with the product's sessions and optimizer. Beside stage 2, as its baseline: the
same rounds on the samples of stage 1 that end, alone. Exit status 1 unless overlong answers fall by 90% and exact match
by no more than 4%.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from pathlib import Path

import torch

from benchmarks.length_control_traces import (
    CLOSE,
    Question,
    questions,
    write_lines,
    write_task,
    write_tokenizer,
)
from psyche_node.data import PackedDataset
from psyche_node.data.prepare import prepare
from psyche_node.evaluation import Measure, Subject, TaskResult, open_tasks, run_suite
from psyche_node.evaluation.steps import finish
from psyche_node.training import Session, TrainingTerms, make_demo_model
from psyche_node.training.schedule import Schedule, fp32_bits

MODEL = {
    "model_type": "seed_oss",
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
LENGTH, BATCH, MEMBERS = 96, 20, 2
BUDGET = 64
"""Tokens of reasoning; the longest trace that ends has 27."""
ROOM = BUDGET + 8
"""Tokens of an answer, reasoning included."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Rounds, and the peak learning rate (a decimal number, so that its bits are the same everywhere)."""

    rounds: int
    rate: str


def train(start: Path, data: Path, stage: Stage, out: Path) -> list[float]:
    """Train with simulated members, save the model to ``out`` and return the loss of each round."""
    terms = TrainingTerms(
        total_rounds=stage.rounds,
        schedule=Schedule.LINEAR,
        warmup_rounds=5,
        peak_lr_bits=fp32_bits(Fraction(stage.rate)),
        final_lr_bits=fp32_bits(Fraction(stage.rate) / 10),
        clip_norm_bits=fp32_bits(Fraction(1)),
    )
    sessions = [Session(start, PackedDataset(data), terms, "cpu") for _ in range(MEMBERS)]
    share, losses = BATCH // MEMBERS, []
    for number in range(stage.rounds):
        first = number * BATCH
        results = [
            session.train(number, range(first + m * share, first + (m + 1) * share), run=bytes(32), member=m)
            for m, session in enumerate(sessions)
        ]
        for session in sessions:
            session.apply(number, [result.blob for result in results], True)
        losses.append(sum(result.loss for result in results) / MEMBERS)
        if number % 20 == 19:
            print(f"  round {number + 1}: loss {sum(losses[-20:]) / 20:.3f}", flush=True)
    if len({session.fingerprint() for session in sessions}) > 1:
        raise RuntimeError("the members' weights differ")
    sessions[0].save(out)
    return losses


def controlled(model: Path, asked: Sequence[Question]) -> list[dict[str, list[int]]]:
    """Samples of stage 2: what the model says where it does not stop, cut, closed and answered.

    Of their labels only `</think>` and the end token are trained.
    """
    engine = Subject.load(model, "cpu", "float32", LENGTH).engine
    (close,), (end,) = engine.prompts.encode_text(CLOSE), sorted(engine.eos)
    prompts = [engine.encode([{"role": "user", "content": one.text}], thinking=True) for one in asked]
    traces = engine.generate(prompts, BUDGET)
    cut = [
        ((*prompt, *trace.token_ids, close), one)
        for prompt, trace, one in zip(prompts, traces, asked, strict=True)
        if trace.finish_reason == "length" and close not in trace.token_ids
    ]
    samples = []
    for prompt, one in cut:
        ids = [*prompt, *engine.prompts.encode_text(one.answer), end]
        trained = {len(prompt) - 1, len(ids) - 1}
        samples.append(
            {"input_ids": ids, "labels": [token if place in trained else -100 for place, token in enumerate(ids)]}
        )
    return samples


@dataclass(frozen=True, slots=True)
class Figures:
    """A model on the questions whose traces end and on those whose traces do not."""

    ends: TaskResult
    loops: TaskResult

    def of(self, name: str) -> Measure:
        """A figure over both."""
        parts = [(one.samples, one.measures[name]) for one in (self.ends, self.loops)]
        count = sum(samples for samples, _ in parts)
        variance = sum((samples * (measure.stderr or 0.0)) ** 2 for samples, measure in parts)
        return Measure(
            value=sum(samples * measure.value for samples, measure in parts) / count, stderr=sqrt(variance) / count
        )


def measure(model: Path, tasks: Sequence[Path]) -> Figures:
    return Figures(*finish(run_suite(Subject.load(model, "cpu", "float32", LENGTH), open_tasks(tasks))).tasks)


def row(name: str, found: Figures) -> str:
    shares = (found.of("exact_match"), found.ends.measures["exact_match"], found.of("overlong"))
    cells = [f"{100 * one.value:5.1f} ± {100 * (one.stderr or 0):.1f}%" for one in shares]
    return f"| {name:8} | {' | '.join(cells)} | {found.of('tokens').value:5.1f} |"


def run(folder: Path, seed: int, first: Stage, second: Stage, traces: int) -> bool:
    """Both stages and the table. Returns whether length control did what it is for."""
    started = time.monotonic()
    known, asked = questions(seed)
    rng = random.Random(seed)
    often = [known[place % len(known)] for place in range(traces)]
    lines = [{"prompt": one.text, "completion": one.trace(4 * LENGTH, rng)} for one in often]
    ending = [line for line, one in zip(lines, often, strict=True) if not one.loops]
    write_tokenizer(lines, folder / "tokenizer")
    count = make_demo_model(MODEL, folder / "tokenizer", folder / "start", seed)
    tasks = [
        write_task([one for one in asked if one.loops == loops], folder, name, ROOM)
        for name, loops in (("ends", False), ("loops", True))
    ]

    def prepared(name: str, samples: list[dict[str, object]]) -> Path:
        file = write_lines(folder / f"{name}.jsonl", random.Random(seed).sample(samples, len(samples)))
        prepare(file, folder / "tokenizer", folder / name, LENGTH, heldout=0.0, too_long="cut")
        return folder / name

    print(f"stage 1: {count:,} parameters, {len(lines) - len(ending)} of {len(lines)} traces never end", flush=True)
    train(folder / "start", prepared("traces", lines), first, folder / "stage-1")
    samples = controlled(folder / "stage-1", known)
    print(f"stage 2: {len(samples)} of {len(known)} answers were cut at {BUDGET} tokens", flush=True)
    mixed = [*samples, *ending[: len(samples)]]
    train(folder / "stage-1", prepared("controlled", mixed), second, folder / "stage-2")
    print("baseline of stage 2: the traces that end, alone", flush=True)
    train(folder / "stage-1", prepared("ending", ending[: 2 * len(samples)]), second, folder / "baseline")
    found = {name: measure(folder / name, tasks) for name in ("stage-1", "stage-2", "baseline")}
    print(f"\n{len(asked)} questions, thinking on, {ROOM} tokens; ± one standard error\n")
    print("| model    | exact match   | where traces end | overlong     | tokens |\n|---|---|---|---|---|")
    for name, figures in found.items():
        print(row(name, figures))
    before, after = (found[name].of("overlong").value for name in ("stage-1", "stage-2"))
    fall = 1 - after / before if before else 0.0
    change = [
        figure(found["stage-2"]).value - figure(found["stage-1"]).value
        for figure in (lambda one: one.of("exact_match"), lambda one: one.ends.measures["exact_match"])
    ]
    print(
        f"\noverlong: {fall:.1%} fewer; exact match: {100 * change[0]:+.1f} points, where traces end "
        f"{100 * change[1]:+.1f} points; {time.monotonic() - started:.0f} s, {time.process_time():.0f} s of processors"
    )
    report = {
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "parameters": count,
        "results": {name: [one.ends.model_dump(), one.loops.model_dump()] for name, one in found.items()},
    }
    (folder / "length_control.json").write_text(json.dumps(report, indent=1) + "\n")
    return fall >= 0.9 and min(change) >= -0.04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="new folder to keep everything in; default: none is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, nargs=2, default=[160, 24], help="of stage 1 and of stage 2")
    parser.add_argument("--rates", nargs=2, default=["0.003", "0.0005"], help="peak learning rates of the two")
    parser.add_argument("--traces", type=int, default=4000, help="samples of stage 1")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first, second = (Stage(rounds, rate) for rounds, rate in zip(args.rounds, args.rates, strict=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        raise SystemExit(0 if run(folder, args.seed, first, second, args.traces) else 1)


if __name__ == "__main__":
    main()
