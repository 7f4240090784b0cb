"""Several tasks and the held-out loss as one evaluation, in steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psyche_node.data import PackedDataset
from psyche_node.evaluation.answering import Cut, never
from psyche_node.evaluation.errors import TaskError
from psyche_node.evaluation.evaluate import evaluate, lacks_switch
from psyche_node.evaluation.examples import Loaded, open_task
from psyche_node.evaluation.heldout import measure_heldout
from psyche_node.evaluation.results import Results
from psyche_node.evaluation.steps import Steps, T
from psyche_node.evaluation.subject import Subject
from psyche_node.evaluation.task import Thinking
from psyche_node.training.hashing import model_root


def open_tasks(files: Sequence[Path], limit: int = 0, thinking: Thinking | None = None) -> list[Loaded]:
    """Open task files, with ``thinking`` instead of what those say that have a switch.

    Raises:
        TaskError: a file is not a task, or two have one name.
    """
    opened = list[Loaded]()
    for file in files:
        one = open_task(file, limit)
        if thinking is not None and one.task.chat and one.task.kind == "generate_until":
            one = Loaded(one.task.model_copy(update={"thinking": thinking}), one.examples, one.data_sha256)
        if one.task.name in {other.task.name for other in opened}:
            raise TaskError(f"{file}: another task is called {one.task.name!r}, too. Give it another `name`")
        opened.append(one)
    return opened


def run_suite(
    subject: Subject,
    tasks: Sequence[Loaded],
    *,
    data: PackedDataset | None = None,
    sequences: int | None = None,
    round_number: int | None = None,
    fingerprint: int | None = None,
    cut: Cut = never,
) -> Steps[Results]:
    """A step per batch; returns the results.

    The weights must be the same in every step; anything else may happen to the model in between. Raises what
    ``evaluate`` and ``measure_heldout`` do. A task that asks for reasoning of a template without a switch is measured
    once, as the template has it, and its result says so.
    """
    heldout, found = None, []
    # A node's weights are named by their fingerprint, which is cheap: their root would take as long as a checkpoint.
    root = model_root(subject.model).hex() if subject.exact and fingerprint is None else None
    if data is not None:
        heldout = yield from _measured(subject, measure_heldout(subject.model, subject.device, data, sequences))
    for task in tasks:
        for switch in (False,) if lacks_switch(subject, task.task) else task.task.switches:
            found.append((yield from _measured(subject, evaluate(subject, task, switch, cut))))
    return Results(
        model_root=root,
        fingerprint=None if fingerprint is None else f"{fingerprint:016x}",
        round=round_number,
        heldout=heldout,
        tasks=found,
    )


def _measured(subject: Subject, steps: Steps[T]) -> Steps[T]:
    """The steps, each inside ``subject.measured()``, and what is between them outside."""
    while True:
        with subject.measured():
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
        yield
