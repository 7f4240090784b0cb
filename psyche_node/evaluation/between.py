"""Tasks on a model that is being trained, worked on between its rounds.

An evaluation may take many rounds, so it measures a copy of the weights: the copy stands behind the parameters during a
slice, and the live weights come back at its end. That is one more copy in memory, while an evaluation is under way.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from psyche_node.evaluation.evaluate import lacks_switch
from psyche_node.evaluation.opening import open_between
from psyche_node.evaluation.results import Results
from psyche_node.evaluation.steps import Steps
from psyche_node.evaluation.subject import Subject
from psyche_node.evaluation.suite import run_suite
from psyche_node.training.session import Session

log = logging.getLogger(__name__)


class TasksBetween:
    """The tasks of one node.

    Args:
        session: whose model is measured.
        model_dir: folder with its tokenizer and chat template.
        files: task files.

    Raises:
        TaskError: a file is not a task, or one that cannot be interrupted.
        GenerationError: the folder has no tokenizer that can be loaded.
    """

    def __init__(self, session: Session, model_dir: Path, files: Sequence[Path]) -> None:
        self._session = session
        self._tasks = open_between(files)
        self._subject = Subject.lent(session.model, model_dir, session.device)
        for one in self._tasks:
            if lacks_switch(self._subject, one.task):
                log.warning(
                    "%s: the model's chat template has no switch for reasoning: evaluated once, as the template has it",
                    one.task.name,
                )
        self._steps: Steps[Results] | None = None
        self._held: list[tuple[Any, Tensor]] = []
        self._wanted: Callable[[], bool] = lambda: False

    def hold(self, round: int) -> None:
        """Begin to evaluate the present weights, which contain ``round`` rounds; what was under way is given up."""
        self._held = [(parameter, parameter.detach().clone()) for parameter in self._session.model.parameters()]
        self._steps = run_suite(
            self._subject,
            self._tasks,
            round_number=round,
            fingerprint=self._session.fingerprint(),
            cut=lambda: self._wanted(),
        )

    def work(self, wanted: Callable[[], bool], seconds: float) -> str | None:
        """Go on for ``seconds``, or until ``wanted`` says that this process has other things to do.

        Returns the results as canonical JSON, once, when they are there; None before. Raises EvaluationError.
        """
        if self._steps is None:
            return None
        deadline = time.monotonic() + seconds
        self._wanted = lambda: wanted() or time.monotonic() >= deadline
        try:
            with self._shown():
                while not self._wanted():
                    next(self._steps)
        except StopIteration as end:
            self._end()
            return str(end.value.canonical().decode())
        except Exception:
            self._end()
            raise
        return None

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        live = [parameter.data for parameter, _ in self._held]
        for parameter, kept in self._held:
            parameter.data = kept
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._held, live, strict=True):
                parameter.data = data

    def _end(self) -> None:
        self._steps, self._held = None, []
