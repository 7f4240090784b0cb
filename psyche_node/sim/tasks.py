"""The report's table of tasks: a row per figure, a column per evaluation."""

from __future__ import annotations

from typing import Any

from psyche_node import units
from psyche_node.sim.result import RunResult, TaskEvaluation, TaskFigure

_COLUMNS = 6
_SWITCH = {True: "thinking", False: "not thinking", None: ""}
_SHARES = frozenset(["accuracy", "accuracy_normalised", "exact_match", "overlong", "unclosed"])


def tasks_view(result: RunResult) -> dict[str, Any] | None:
    """Everything that the template prints about tasks, as text; None if none was evaluated."""
    shown = _spread(result.evaluations)
    if not shown:
        return None
    rows: dict[tuple[str, bool | None, str], dict[int, TaskFigure]] = {}
    for column, evaluation in enumerate(shown):
        for figure in evaluation.figures:
            rows.setdefault((figure.task, figure.thinking, figure.measure), {})[column] = figure
    return {
        "rounds": [f"{evaluation.round:,}" for evaluation in shown],
        "rows": [
            {
                "task": units.printable(task, 40),
                "thinking": _SWITCH[thinking],
                "measure": measure.replace("_", " "),
                "figures": [_figure(found.get(column)) for column in range(len(shown))],
                "samples": f"{max(figure.samples for figure in found.values()):,}",
            }
            for (task, thinking, measure), found in rows.items()
        ],
        "recorded": [
            {
                "round": f"{evaluation.round:,}",
                "digest": units.short(evaluation.sha256),
                "title": f"SHA-256 {evaluation.sha256}\n{evaluation.signature or 'not on chain'}",
                "on_chain": evaluation.signature is not None,
            }
            for evaluation in result.evaluations
        ],
        "left_out": len(result.evaluations) - len(shown),
        "node": units.printable(shown[-1].node, 24),
    }


def task_lines(evaluation: TaskEvaluation) -> list[str]:
    """A line of figures for each task of an evaluation, with their standard errors."""
    lines: dict[tuple[str, bool | None], list[str]] = {}
    for figure in evaluation.figures:
        value, error = _figure(figure)
        words = " ".join(filter(None, (figure.measure.replace("_", " "), value, error)))
        lines.setdefault((figure.task, figure.thinking), []).append(words)
    return [
        " ".join(filter(None, (units.printable(task, 40), _SWITCH[thinking]))) + ": " + ", ".join(figures)
        for (task, thinking), figures in lines.items()
    ]


def _spread(evaluations: list[TaskEvaluation]) -> list[TaskEvaluation]:
    """As many as the table has room for, the first and the last among them."""
    count = len(evaluations)
    if count <= _COLUMNS:
        return evaluations
    return [evaluations[place * (count - 1) // (_COLUMNS - 1)] for place in range(_COLUMNS)]


def _figure(figure: TaskFigure | None) -> tuple[str, str]:
    """(value, standard error) as text."""
    if figure is None:
        return "", ""
    if figure.measure in _SHARES:
        return f"{figure.value:.1%}", "" if figure.stderr is None else f"± {100 * figure.stderr:.1f}"
    return f"{figure.value:.3f}", "" if figure.stderr is None else f"± {figure.stderr:.3f}"
