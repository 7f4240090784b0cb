"""Evaluation: held-out loss, and tasks from local files in the style of lm-evaluation-harness.

Settings and results need no torch; what measures loads it when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from psyche_node.evaluation.errors import EvaluationError, TaskError
from psyche_node.evaluation.results import Heldout, Measure, Results, TaskResult, read_results
from psyche_node.evaluation.task import Task, load_task

if TYPE_CHECKING:
    from psyche_node.evaluation.opening import open_tasks
    from psyche_node.evaluation.subject import Subject
    from psyche_node.evaluation.suite import run_suite

_HOMES = {"Subject": "subject", "open_tasks": "opening", "run_suite": "suite"}

__all__ = [
    "EvaluationError",
    "Heldout",
    "Measure",
    "Results",
    "Subject",
    "Task",
    "TaskError",
    "TaskResult",
    "load_task",
    "open_tasks",
    "read_results",
    "run_suite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'psyche_node.evaluation' has no attribute {name!r}")
    return getattr(import_module(f"psyche_node.evaluation.{_HOMES[name]}"), name)
