"""A node's training process, ``python -m psyche_node.trainer --fd N``: where training and data meet.

Started by the supervisor with one end of a socket pair; it ends when the other end is closed. With RANK and WORLD_SIZE
in the environment it is one of several ranks that train one replica: rank 0 has the socket, the others, which have
none, do what it does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psyche_node.evaluation.between import TasksBetween
    from psyche_node.training.control import Control
    from psyche_node.training.session import Session
    from psyche_node.training.world import World


def main(arguments: list[str] | None = None) -> int:
    """Run the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="psyche_node.trainer", description="The training process of a node.")
    parser.add_argument("--fd", type=int, help="the inherited end of the supervisor's socket pair; rank 0 has one")
    parser.add_argument("--store-fd", type=int, help="inherited, and listening at MASTER_ADDR:MASTER_PORT")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as the supervisor's Load says")
    parser.add_argument("--log-level", default="INFO")
    options = parser.parse_args(arguments)
    # Ctrl-C reaches the whole process group, and SIGTERM all processes of a service; the supervisor decides what
    # happens, and closes the socket. A rank that torchrun has started has no supervisor but torchrun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervised = "TORCHELASTIC_RUN_ID" not in os.environ or options.fd is not None
    # The kernel's own answer: one in Python would wait until an exchange with the other ranks is over.
    signal.signal(signal.SIGTERM, signal.SIG_IGN if supervised else signal.SIG_DFL)
    # Threads that wait for work must not spin: several training processes may share this machine's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # Importing torch and transformers makes millions of objects that all stay: collecting in between takes a fifth of
    # the time to the first round.
    gc.disable()
    from psyche_node import log
    from psyche_node.data import PackedDataset
    from psyche_node.training.errors import TrainingError
    from psyche_node.training.server import run_rank, run_trainer
    from psyche_node.training.world import ONE_PROCESS

    gc.freeze()
    gc.enable()
    rank, several = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) > 1
    log.configure(f"training rank {rank}" if several else "training", options.log_level)
    if (rank == 0) != (options.fd is not None):
        parser.error("rank 0, and no other, has --fd: it is started by psyche-node run")

    def open_data(folder: Path, expect: bytes | None, published: str) -> PackedDataset:
        # One rank of a host reads it all; ranks load together, so if it refuses, all do.
        verify = int(os.environ.get("LOCAL_RANK", "0")) == 0
        return PackedDataset(folder, expect, verify, published)

    def open_tasks(session: Session, model: Path, files: Sequence[Path]) -> TasksBetween:
        # Imported late: generation and its parts take a second that a node without tasks need not wait.
        from psyche_node.evaluation.between import TasksBetween

        return TasksBetween(session, model, files)

    try:
        with _ranks(options.store_fd) if several else contextlib.nullcontext((ONE_PROCESS, None)) as (world, control):
            if options.fd is not None:
                run_trainer(options.fd, open_data, open_tasks, world, control)
            elif control is not None:
                run_rank(open_data, open_tasks, world, control)
    except (TrainingError, ConnectionError) as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0


@contextlib.contextmanager
def _ranks(listening: int | None) -> Iterator[tuple[World, Control | None]]:
    """Be one of several, until the end of the block."""
    # Imported late: one process needs no DTensors, which take 1.5 s.
    from psyche_node.training.ranks import join, part

    try:
        yield join(listening)
    finally:
        part()


if __name__ == "__main__":
    sys.exit(main())
