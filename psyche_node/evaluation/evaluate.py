"""Tasks on a model, step by step: after each batch the caller may do something else, and go on later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from psyche_node.evaluation.answering import Cut, Reply, answer, never
from psyche_node.evaluation.answers import extract, matches
from psyche_node.evaluation.errors import EvaluationError
from psyche_node.evaluation.examples import Example, Loaded
from psyche_node.evaluation.likelihood import Pair, Score, encode_answer, encode_pair, score_pairs
from psyche_node.evaluation.results import Measure, TaskResult, mean
from psyche_node.evaluation.steps import Steps
from psyche_node.evaluation.subject import Subject
from psyche_node.evaluation.task import Task
from psyche_node.generation import Request, begins_inside, split_reasoning
from psyche_node.generation.prompts import Prompt
from psyche_node.generation.reasoning import BEGIN, END, SEED_BEGIN, SEED_END

_SEEDS = 1 << 31
_ENCODED = 32
"""Examples that are tokenized in one step."""


def evaluate(subject: Subject, loaded: Loaded, thinking: bool | None, cut: Cut = never) -> Steps[TaskResult]:
    """A step per batch; returns the task's result. Each step runs inside ``subject.measured()``.

    Args:
        thinking: the chat template's switch; None where the task has none.
        cut: asked at every generated token; see ``answer``.

    Raises:
        EvaluationError: an example does not fit the model's context, or the model has no template for the task.
        GenerationError: the chat template refuses a prompt.
    """
    task = loaded.task
    if task.kind == "generate_until":
        return (yield from _generated(subject, loaded, thinking, cut))
    pairs, owners = yield from _pairs(subject, loaded)
    scores = yield from score_pairs(subject.model, subject.device.torch, pairs)
    by_example: list[list[Score]] = [[] for _ in loaded.examples]
    for owner, score in zip(owners, scores, strict=True):
        by_example[owner].append(score)
    truncated = len({owner for owner, pair in zip(owners, pairs, strict=True) if pair.truncated})
    return _result(loaded, None, truncated, (_chosen if task.kind == "multiple_choice" else _said)(loaded, by_example))


def lacks_switch(subject: Subject, task: Task) -> bool:
    """Whether a task asks for reasoning and the model's chat template has no switch for it."""
    return True in task.switches and not subject.engine.prompts.thinks


def prompt_of(subject: Subject, task: Task, example: Example, thinking: bool | None) -> Prompt:
    """Return the prompt as the model is given it, few-shot examples and chat template included."""
    if not task.chat:
        shots = [f"{prompt}{task.delimiter}{answer}{task.shot_delimiter}" for prompt, answer in example.shots]
        opening = f"{task.description}{task.shot_delimiter}" if task.description else ""
        return Prompt(opening + "".join(shots) + example.prompt, ())
    messages = [{"role": "system", "content": task.description}] if task.description else []
    for prompt, said in (*example.shots, (example.prompt, None)):
        messages.append({"role": "user", "content": prompt})
        messages += [{"role": "assistant", "content": said}] if said is not None else []
    return subject.engine.prompts.render(messages, thinking=thinking)


def _pairs(subject: Subject, loaded: Loaded) -> Steps[tuple[list[Pair], list[int]]]:
    """(context with continuation, the example it belongs to) of every choice or target."""
    task, prompts = loaded.task, subject.engine.prompts
    pairs, owners = list[Pair](), list[int]()
    for index, example in enumerate(loaded.examples):
        context = prompt_of(subject, task, example, False if task.chat else None)
        prefix = () if task.chat else subject.opening(context.text)
        for said in example.choices or example.accepted[:1]:
            if task.chat:
                pair = encode_answer(prompts.encode, context, said, subject.context)
            else:
                text = task.delimiter + said
                pair = encode_pair(prompts.encode_text, prefix, context.text, text, subject.context)
            pairs.append(pair)
            owners.append(index)
        if index % _ENCODED == 0:
            yield
    return pairs, owners


def _chosen(loaded: Loaded, by_example: Sequence[Sequence[Score]]) -> dict[str, Measure]:
    """Accuracy of the likeliest choice, and of the likeliest by its length in characters (lm-eval's acc, acc_norm)."""
    plain, by_length = list[float](), list[float]()
    for example, scores in zip(loaded.examples, by_example, strict=True):
        sums = [score.logprob for score in scores]
        per_character = [total / max(len(c), 1) for total, c in zip(sums, example.choices, strict=True)]
        for values, rights in ((sums, plain), (per_character, by_length)):
            rights.append(float(values.index(max(values)) == example.right))
    return {"accuracy": mean(plain), "accuracy_normalised": mean(by_length)}


def _said(loaded: Loaded, by_example: Sequence[Sequence[Score]]) -> dict[str, Measure]:
    """Whether every token of the target is the likeliest one, and the target's loss in nats per token."""
    scores = [one for (one,) in by_example]
    return {
        "accuracy": mean([float(one.greedy) for one in scores]),
        "loss": mean([-one.logprob / one.tokens for one in scores]),
    }


def _generated(subject: Subject, loaded: Loaded, thinking: bool | None, cut: Cut) -> Steps[TaskResult]:
    task, engine = loaded.task, subject.engine
    requests, inside = list[Request](), list[str | None]()
    for index, example in enumerate(loaded.examples):
        prompt = prompt_of(subject, task, example, thinking)
        tokens = (*(() if task.chat else subject.opening(prompt.text)), *engine.prompts.encode(prompt))
        inside += [begins_inside(prompt.text)] * task.samples
        for sample in range(task.samples):
            seed = (task.seed * 1_000_003 + index * task.samples + sample) % _SEEDS
            requests.append(Request(tokens, task.max_new_tokens, task.temperature, task.top_p, seed, tuple(task.stop)))
        if index % _ENCODED == 0:
            yield
    replies = yield from answer(engine, requests, cut)
    groups = [slice(start, start + task.samples) for start in range(0, len(replies), task.samples)]
    graded = [
        _grade(task, example, reply, opened)
        for example, group in zip(loaded.examples, groups, strict=True)
        for reply, opened in zip(replies[group], inside[group], strict=True)
    ]
    # Answers to one question are not independent: the standard error is that over the questions.
    measures = {name: mean([fmean(one[name] for one in graded[group]) for group in groups]) for name in graded[0]}
    unswitched = lacks_switch(subject, task)
    if thinking is not None and not engine.prompts.thinks:
        # Not what was asked for, but what the template does.
        always = any(opened is not None for opened in inside)
        unswitched, thinking = unswitched or always, always
    return _result(loaded, thinking, 0, measures, unswitched=unswitched)


def _grade(task: Task, example: Example, reply: Reply, inside: str | None) -> dict[str, float]:
    opened = inside is not None or reply.text.lstrip().startswith((BEGIN, SEED_BEGIN))
    unclosed = opened and END not in reply.text and SEED_END not in reply.text
    said = "" if unclosed else split_reasoning(reply.text, inside).answer
    right = matches(extract(task.extract, said), example.accepted, task.match)
    return {
        "exact_match": float(right),
        "overlong": float(unclosed or not reply.ended),
        "unclosed": float(unclosed),
        "tokens": float(reply.tokens),
    }


def _result(
    loaded: Loaded,
    thinking: bool | None,
    truncated: int,
    measures: dict[str, Measure],
    *,
    unswitched: bool = False,
) -> TaskResult:
    task = loaded.task
    if not all(math.isfinite(measure.value) for measure in measures.values()):
        raise EvaluationError(f"task {task.name}: the model's log-likelihoods are not finite; its weights are damaged")
    return TaskResult(
        task=task.name,
        kind=task.kind,
        thinking=thinking,
        unswitched=unswitched,
        samples=len(loaded.examples),
        repeats=task.samples,
        few_shot=task.few_shot,
        truncated=truncated,
        measures=measures,
        task_sha256=task.sha256,
        data_sha256=loaded.data_sha256,
    )
