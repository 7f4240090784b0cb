"""Several tasks and the held-out loss as one evaluation, in steps."""

from __future__ import annotations

from collections.abc import Sequence

from psyche_node.data import PackedDataset
from psyche_node.evaluation.answering import Cut, never
from psyche_node.evaluation.evaluate import evaluate, lacks_switch
from psyche_node.evaluation.examples import Loaded
from psyche_node.evaluation.heldout import measure_heldout
from psyche_node.evaluation.results import Results
from psyche_node.evaluation.steps import Steps, T
from psyche_node.evaluation.subject import Subject
from psyche_node.training.hashing import model_root


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
