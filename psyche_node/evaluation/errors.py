"""What can go wrong between a task file and its figures; every message says what, where, and what to do."""

from __future__ import annotations


class EvaluationError(Exception):
    """A task, its data or a file of results cannot be used."""


class TaskError(EvaluationError):
    """A task file or the data it names is not what a task is made of."""
