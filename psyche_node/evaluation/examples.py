"""From a task's data file to examples: rendered prompts, right answers, the few-shot examples before them."""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from psyche_node.data.errors import DataError
from psyche_node.data.readers import read_records
from psyche_node.evaluation.errors import TaskError
from psyche_node.evaluation.task import Task, load_task
from psyche_node.evaluation.templates import listed, render

MAX_ROWS = 1_000_000
_DIGITS = 10
Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Example:
    """One question.

    Attributes:
        prompt: what the model is given.
        accepted: right answers; of multiple choice: the right choice alone.
        choices: of multiple choice, in order; else empty.
        right: place of the right choice; 0 where there are none.
        shots: (prompt, answer) of the few-shot examples before it.
    """

    prompt: str
    accepted: tuple[str, ...]
    choices: tuple[str, ...]
    right: int
    shots: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A task with its examples. ``data_sha256`` is that of the data file and of the file of few-shot examples."""

    task: Task
    examples: tuple[Example, ...]
    data_sha256: str


def open_task(path: Path, limit: int = 0) -> Loaded:
    """Read a task file and its data, and render every example; ``limit`` examples at most, if not 0.

    Raises:
        TaskError: a file cannot be read, or an example does not have what the task's templates need.
    """
    task, folder = load_task(path)
    data = folder / task.data
    rows, others, digest = read_rows(data), None, hashlib.sha256(data.read_bytes())
    if task.few_shot_data is not None:
        others = read_rows(folder / task.few_shot_data)
        digest.update((folder / task.few_shot_data).read_bytes())
    wanted = spread(len(rows), min(filter(None, (task.limit, limit)), default=0))
    pool = rows if others is None else others
    return Loaded(task, tuple(_example(task, rows[index], index, pool) for index in wanted), digest.hexdigest())


def read_rows(path: Path) -> list[Row]:
    """Return (place, fields) of every row of a JSONL or parquet file. Raises TaskError, which names the place."""
    rows: list[Row] = []
    try:
        for row in read_records(path):
            rows.append(row)
            if len(rows) > MAX_ROWS:
                raise TaskError(f"{path} has more than {MAX_ROWS} examples. Split it")
    except DataError as error:
        raise TaskError(str(error)) from error
    if not rows:
        raise TaskError(f"{path} has no example in it. Write one JSON object per line")
    return rows


def spread(count: int, limit: int) -> list[int]:
    """Return ``limit`` places (0: all) spread evenly over ``count``."""
    taken = min(limit, count) if limit else count
    return [place * count // taken for place in range(taken)]


def _example(task: Task, row: Row, index: int, pool: Sequence[Row]) -> Example:
    alone = _alone(task, row)
    return replace(alone, shots=_shots(task, row[0], alone, index, pool)) if task.few_shot else alone


def _alone(task: Task, row: Row) -> Example:
    """An example without others before it."""
    where, fields = row
    return Example(render(task.prompt, fields, where), *_answers(task, fields, where), ())


def _shots(task: Task, where: str, mine: Example, index: int, pool: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """The examples that are shown before ``mine``; none of them is the same."""
    drawn, found = task.few_shot + 1, list[Example]()
    while True:
        # An example's own draw, so that a limit does not change what the others see.
        places = random.Random(f"{task.seed} {index}").sample(range(len(pool)), min(drawn, len(pool)))
        found = [one for place in places if (one := _alone(task, pool[place])) != mine][: task.few_shot]
        if len(found) == task.few_shot:
            return tuple((one.prompt, one.accepted[0]) for one in found)
        if drawn >= len(pool):
            raise TaskError(
                f"{where}: too few examples to show {task.few_shot} of them before its prompt: there are {len(found)} "
                "beside itself. Lower few_shot, or name a larger few_shot_data"
            )
        drawn *= 2


def _answers(task: Task, fields: dict[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """(right answers, choices, place of the right choice)"""
    if task.kind != "multiple_choice":
        accepted = listed(task.accept, fields, where) if task.accept else [render(task.target, fields, where)]
        return tuple(accepted), (), 0
    if isinstance(task.choices, str):
        choices = listed(task.choices, fields, where)
    else:
        choices = [render(template, fields, where) for template in task.choices]
    if task.target:
        target = render(task.target, fields, where).strip()
        places = [place for place, choice in enumerate(choices) if choice.strip() == target]
        if len(places) != 1:
            raise TaskError(f"{where}: {target!r} is {len(places)} of the choices {choices}. It must be one of them")
        return (choices[places[0]],), tuple(choices), places[0]
    right = _place(render(task.target_index, fields, where).strip(), choices, where)
    return (choices[right],), tuple(choices), right


def _place(text: str, choices: Sequence[str], where: str) -> int:
    if text.isdecimal():
        place = int(text) if len(text) < _DIGITS else len(choices)
    else:
        place = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
    if not 0 <= place < len(choices):
        raise TaskError(
            f"{where}: target_index is {text!r}, and there are {len(choices)} choices. Use a number from 0 or a letter "
            "from A"
        )
    return place
