"""What can go wrong in training; every message says what, where, and what to do."""

from __future__ import annotations

from psyche_node.exits import Reported


class TrainingError(Exception):
    """The training process cannot do what it was asked to."""


class ModelError(TrainingError):
    """A model folder or configuration cannot be used."""


class DeviceError(TrainingError):
    """The device that was asked for is unknown, or not there."""


class NotTheRuns(ModelError):
    """A model folder holds another model than the one that the run trains."""


class SeparationError(TrainingError):
    """Logits depend on tokens that they must not: on other documents of a pack, or on what comes after them."""


class OutOfMemory(TrainingError):
    """A step needed more memory than there is. It was given up, and nothing has changed."""


class RankFailed(Reported, TrainingError):
    """A step failed on another of this node's ranks; the message names it. ``exit_code``: what it means there, if that
    is known."""

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfStep(TrainingError):
    """Ranks of this node are at different places and cannot go on together: the training process has to end."""
