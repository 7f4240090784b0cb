"""The real training process: a slice of tasks makes way for the next request, and what comes out is right."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche_node.data import prepare
from psyche_node.evaluation import Results, Subject, open_tasks, run_suite
from psyche_node.evaluation.steps import finish
from psyche_node.ipc import Endpoint, Ok, RemoteFailure
from psyche_node.training import TrainingTerms
from psyche_node.training import messages as m

ROWS = [{"q": f"what is {a} plus {a}", "sum": 2 * a} for a in range(2, 14)]


def test_a_slice_makes_way_for_training(folder: Path, tmp_path: Path, write_task: Callable[..., Path]) -> None:
    lines = [{"prompt": f"what is {a}", "completion": f"it is {a} plus nothing"} for a in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(tmp_path / "chat.jsonl", folder, tmp_path / "data", 64)
    settings = {"kind": "generate_until", "prompt": "{{ q }}?", "target": "{{ sum }}", "stop": ["no such text"]}
    short = write_task(ROWS, name="short", max_new_tokens=80, **settings)
    terms = TrainingTerms(total_rounds=9, peak_lr_bits=0x3C000000, final_lr_bits=0)

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        arguments = [sys.executable, "-m", "psyche_node.trainer", "--fd", str(theirs.fileno()), "--threads", "1"]
        process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()])
        theirs.close()
        trainer = await Endpoint.over("training", ours, lambda event: None)
        try:
            await trainer.call(
                m.Load(model=str(folder), data=str(tmp_path / "data"), terms=terms, device="cpu"), m.Loaded
            )
            with pytest.raises(RemoteFailure, match="came before OpenTasks"):
                await trainer.call(m.HoldWeights(round=0), Ok)
            with pytest.raises(RemoteFailure, match="TaskError"):
                await trainer.call(m.OpenTasks(files=[str(tmp_path / "none.json")]), Ok)
            await trainer.call(m.OpenTasks(files=[str(short)]), Ok)
            await trainer.call(m.HoldWeights(round=0), Ok)
            # The second request follows at once, and the slice would take hundreds of steps.
            slice_ = asyncio.create_task(trainer.call(m.WorkOnTasks(seconds=3600.0), m.TasksWorked))
            train = m.Train(round=0, positions=[0], run="ab" * 32, member=0, out_path=str(tmp_path / "update"))
            training = asyncio.create_task(trainer.call(train, m.Trained))
            interrupted, trained = await asyncio.gather(slice_, training)
            assert interrupted.results is None
            assert trained.tokens > 0
            await trainer.call(m.Apply(round=0, paths=[str(tmp_path / "update")], included=True), m.Applied)
            worked = None
            while worked is None:
                worked = (await trainer.call(m.WorkOnTasks(seconds=3600.0), m.TasksWorked)).results
            found = Results.model_validate_json(worked)
            assert (
                found.fingerprint == f"{trained.fingerprint_before:016x}"
            )  # the weights that were held, not the new ones
            assert (
                found.tasks == finish(run_suite(Subject.load(folder, "cpu", "float32", 64), open_tasks([short]))).tasks
            )
        finally:
            await trainer.close()
            await asyncio.to_thread(process.wait, 30)

    asyncio.run(asyncio.wait_for(scenario(), 120))
