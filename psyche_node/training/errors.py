"""What can go wrong in training; every message says what, where, and what to do."""

from __future__ import annotations


class TrainingError(Exception):
    """The training process cannot do what it was asked to."""


class ModelError(TrainingError):
    """A model folder or configuration cannot be used."""


class SeparationError(TrainingError):
    """Packed documents see each other: training would learn from unrelated text."""
