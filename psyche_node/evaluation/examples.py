"""From a task's data file to examples: rendered prompts, right answers, the few-shot examples before them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_node.evaluation.errors import TaskError
from psyche_node.evaluation.task import Task, load_task
from psyche_node.evaluation.templates import listed, render

MAX_ROWS = 1_000_000
Row = dict[str, Any]


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
    rows = read_rows(data)
    shots_file = None if task.few_shot_data is None else folder / task.few_shot_data
    shown = rows if shots_file is None else read_rows(shots_file)
    if task.few_shot and len(shown) <= task.few_shot:
        raise TaskError(
            f"{shots_file or data} has {len(shown)} examples, too few for {task.few_shot} few-shot examples. Lower "
            "few_shot, or name a larger few_shot_data"
        )
    examples = tuple(
        _example(task, rows, index, data, shown if shots_file else None, shots_file or data)
        for index in spread(len(rows), min(filter(None, (task.limit, limit)), default=0))
    )
    digest = hashlib.sha256(data.read_bytes())
    if shots_file is not None:
        digest.update(shots_file.read_bytes())
    return Loaded(task, examples, digest.hexdigest())


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL or parquet file. Raises TaskError, which names the line."""
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}. Name a JSONL or parquet file") from error
    if not rows:
        raise TaskError(f"{path} has no example in it. Write one JSON object per line")
    if len(rows) > MAX_ROWS:
        raise TaskError(f"{path} has {len(rows)} examples, more than {MAX_ROWS}. Split it")
    return rows


def spread(count: int, limit: int) -> list[int]:
    """Return ``limit`` places (0: all) spread evenly over ``count``."""
    taken = min(limit, count) if limit else count
    return [place * count // taken for place in range(taken)]


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{path}:{number} is not JSON: {error}. Write one JSON object per line") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}:{number} is not a JSON object. Write one object with named fields per line")
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise TaskError(f"{path} is not a parquet file that can be read: {error}") from error
    return rows


def _example(task: Task, rows: list[Row], index: int, data: Path, others: list[Row] | None, shown_in: Path) -> Example:
    where = f"{data}, example {index + 1}"
    row = rows[index]
    accepted, choices, right = _answers(task, row, where)
    shots = []
    if task.few_shot:
        pool = rows if others is None else others
        # An example's own draw, so that a limit does not change what the others see.
        draw = random.Random(f"{task.seed} {index}").sample(range(len(pool)), task.few_shot + 1)
        for place in [place for place in draw if others is not None or place != index][: task.few_shot]:
            at = f"{shown_in}, example {place + 1}"
            shots.append((render(task.prompt, pool[place], at), _answers(task, pool[place], at)[0][0]))
    return Example(render(task.prompt, row, where), accepted, choices, right, tuple(shots))


def _answers(task: Task, row: Row, where: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """(right answers, choices, place of the right choice)"""
    if task.kind != "multiple_choice":
        accepted = listed(task.accept, row, where) if task.accept else [render(task.target, row, where)]
        return tuple(accepted), (), 0
    if isinstance(task.choices, str):
        choices = listed(task.choices, row, where)
    else:
        choices = [render(template, row, where) for template in task.choices]
    if task.target:
        target = render(task.target, row, where).strip()
        places = [place for place, choice in enumerate(choices) if choice.strip() == target]
        if len(places) != 1:
            raise TaskError(f"{where}: {target!r} is {len(places)} of the choices {choices}. It has to be one of them")
        return (choices[places[0]],), tuple(choices), places[0]
    right = _place(render(task.target_index, row, where).strip(), choices, where)
    return (choices[right],), tuple(choices), right


def _place(text: str, choices: Sequence[str], where: str) -> int:
    place = int(text) if text.isdecimal() else ord(text.upper()) - ord("A") if len(text) == 1 else -1
    if not 0 <= place < len(choices):
        raise TaskError(
            f"{where}: target_index is {text!r}, and there are {len(choices)} choices. Use a number from 0 or a letter "
            "from A"
        )
    return place
