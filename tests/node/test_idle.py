"""Tasks in a node's spare time, against a scripted training process: when slices are asked for, and what becomes of
their results."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from node_stage import child, run_async, settle

from coordinator.client import ChainUnavailable
from psyche_node.evaluation import Measure, Results, TaskResult, read_results
from psyche_node.ipc import Message, Ok, RemoteFailure
from psyche_node.node.idle import IdleTasks
from psyche_node.node.journal import Journal, JournalReader
from psyche_node.training.messages import HoldWeights, OpenTasks, TasksWorked, WorkOnTasks

FOUND = TaskResult(
    task="sums", kind="multiple_choice", thinking=None, samples=4, repeats=1, few_shot=0, truncated=0,
    measures={"accuracy": Measure(value=0.5, stderr=0.25)}, task_sha256="aa", data_sha256="bb",
)  # fmt: skip


class Scene:
    """A training process that needs slices for as long as ``enough`` is not set, and a chain that may be away."""

    def __init__(self, folder: Path) -> None:
        self.enough, self.round = True, -1
        self.asked: list[str] = []
        self.sent: list[tuple[int, bytes]] = []
        self.told: list[Results] = []
        self.away = False
        self.fails: set[type[Message]] = set()
        self.journal = JournalReader(folder / "journal.jsonl")
        self.idle: IdleTasks

    def train(self, message: Message) -> Message:
        self.asked.append(type(message).__name__)
        if type(message) in self.fails:
            raise ValueError("out of memory")
        if isinstance(message, HoldWeights):
            self.round = message.round
        if not isinstance(message, WorkOnTasks):
            return Ok()
        results = Results(round=self.round, fingerprint="0" * 16, tasks=[FOUND])
        return TasksWorked(results=results.canonical().decode() if self.enough else None, seconds=0.5)

    async def record_evaluation(self, round: int, digest: bytes) -> Any:
        if self.away:
            raise ChainUnavailable("away")
        self.sent.append((round, digest))
        return f"signature-{round}"

    def lines(self) -> list[dict[str, Any]]:
        return [line for line in self.journal.read() if line["kind"] == "tasks"]


@contextlib.asynccontextmanager
async def scene(folder: Path, files: tuple[Path, ...] = (Path("task.toml"),)) -> AsyncIterator[Scene]:
    it = Scene(folder)
    async with child(it.train) as (trainer, _):
        journal = Journal(folder / "journal.jsonl")
        it.idle = IdleTasks(files, trainer, it, journal, folder, it.told.append)
        try:
            yield it
        finally:
            journal.close()


def test_slices_are_asked_for_in_spare_time_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.enough = False
            await it.idle.open()
            with it.idle.spare():
                await asyncio.sleep(0)
            assert it.asked == ["OpenTasks"]  # nothing was begun
            await it.idle.begin(3)
            assert it.asked == ["OpenTasks", "HoldWeights"]
            with it.idle.spare():
                await settle(lambda: it.asked.count("WorkOnTasks") >= 2)
            # What was under way comes back, and no other is asked for.
            await it.idle._worker  # type: ignore[misc]
            stopped = it.asked.count("WorkOnTasks")
            it.enough = True
            with it.idle.spare():
                await settle(lambda: bool(it.told))
                await it.idle._worker  # type: ignore[misc]
            assert it.asked.count("WorkOnTasks") == stopped + 1
            (line,) = it.lines()
            assert (line["round"], line["signature"], line["seconds"]) == (3, "signature-3", 0.5 * stopped + 0.5)
            assert line["results"] == [FOUND.model_dump(mode="json")]
            written = read_results(Path(line["file"]))
            assert it.sent == [(3, written.digest)]
            assert (line["sha256"], written) == (written.digest.hex(), it.told[0])

    run_async(test())


def test_one_evaluation_at_a_time_and_the_last_weights_in_any_case(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            await it.idle.begin(3)
            await it.idle.begin(6)  # the one of round 3 is still under way
            assert it.asked == ["HoldWeights"]
            await it.idle.finish(9)
            assert [line["round"] for line in it.lines()] == [3, 9]
            await it.idle.finish(9)
            assert it.lines() == []

    run_async(test())


def test_a_chain_that_is_away_costs_the_digest_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.away = True
            await it.idle.finish(2)
            (line,) = it.lines()
            assert (line["round"], line["signature"]) == (2, None)
            assert json.loads(Path(line["file"]).read_text())["round"] == 2

    run_async(test())


def test_results_that_cannot_be_written_cost_themselves_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            (tmp_path / "evaluations").write_text("in the way, as a full disk would be")
            await it.idle.finish(2)
            assert (it.lines(), it.sent) == ([], [])
            assert "the results after 2 rounds are not kept" in caplog.text
            (tmp_path / "evaluations").unlink()
            await it.idle.finish(4)
            assert [line["round"] for line in it.lines()] == [4]
            assert [results.round for results in it.told] == [2, 4], "the metrics have both"

    run_async(test())


def test_an_evaluation_that_fails_is_given_up_and_the_next_one_is_made(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            for what in (HoldWeights, WorkOnTasks):
                it.fails = {what}
                await it.idle.begin(2)
                with it.idle.spare():
                    await asyncio.sleep(0)
                await it.idle._complete()
            assert it.lines() == []
            it.fails = set()
            await it.idle.finish(4)
            assert [line["round"] for line in it.lines()] == [4]

    run_async(test())


def test_a_bad_task_file_is_told_at_the_start(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as it:
            it.fails = {OpenTasks}
            with pytest.raises(RemoteFailure, match="out of memory"):
                await it.idle.open()

    run_async(test())


def test_without_tasks_nothing_is_asked(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, files=()) as it:
            await it.idle.open()
            await it.idle.begin(1)
            await it.idle.finish(2)
            assert it.asked == []

    run_async(test())
