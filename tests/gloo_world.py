"""Processes of a gloo group that run cases by name: started once, since importing torch takes longer than any case.

Every rank runs the same function of a module of cases. If one raises or hangs, the test fails with what each rank said,
and the next test starts the group anew.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

READY = "ready"
TIMEOUT = 500.0
# Imported once and inherited by all ranks; DTensors import torch._dynamo on first use.
PRELOAD = ["numpy", "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]


class World:
    """`size` ranks, or none while nothing has run.

    `cases` is the module with the cases, `folder` is for logs and the meeting place; `environment` comes on top of what
    is inherited.
    """

    def __init__(self, size: int, folder: Path, cases: str, environment: Mapping[str, str] | None = None) -> None:
        self.size, self._folder, self._cases, self._starts = size, folder, cases, 0
        self._environment = dict(environment or {})
        self._ranks: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, case: str) -> None:
        """Run a case on every rank. Raises AssertionError with their tracebacks and logs."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send(case)
        answers = [self._answer(rank) for rank in range(self.size)]
        if any(answers):
            self.stop()
            logs = [self._log(rank).read_text()[-4000:] for rank in range(self.size)]
            said = [f"rank {rank}: {answers[rank] or 'fine'}\nlog: {logs[rank]}" for rank in range(self.size)]
            raise AssertionError(f"{case} on {self.size} ranks\n" + "\n".join(said))

    def stop(self) -> None:
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        self._starts += 1
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            store = self._folder / f"store{self._starts}"
            arguments = (rank, self.size, self._cases, store, self._log(rank), theirs, self._environment)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        answers = [self._answer(rank) for rank in range(self.size)]
        assert answers == [READY] * self.size, answers

    def _answer(self, rank: int) -> str:
        _, pipe = self._ranks[rank]
        try:
            return str(pipe.recv()) if pipe.poll(TIMEOUT) else f"no answer in {TIMEOUT} s"
        except EOFError:
            return "the process died"

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.{self._starts}.log"


def _serve(
    rank: int, size: int, cases: str, store: Path, log: Path, pipe: Connection, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module = importlib.import_module(cases)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    pipe.send(READY)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(TIMEOUT * 0.8)
        try:
            getattr(module, case)()
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
