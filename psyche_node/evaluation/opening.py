"""Task files opened together; needs no torch, so that whoever starts processes for them can look first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from psyche_node.evaluation.errors import TaskError
from psyche_node.evaluation.examples import Loaded, open_task
from psyche_node.evaluation.task import Thinking


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


def open_between(files: Sequence[Path]) -> list[Loaded]:
    """Open the task files of a node, which works on them between rounds.

    Raises:
        TaskError: a file is not a task, or one that cannot be interrupted; or two have one name.
    """
    opened = open_tasks(files)
    for file, one in zip(files, opened, strict=True):
        if one.task.temperature > 0.0:
            raise TaskError(
                f"{file}: a node interrupts its tasks whenever a round begins, which would change sampled answers; "
                "set the temperature to 0, or use `psyche-node eval` on the checkpoint"
            )
    return opened
