"""A node's training process, ``python -m psyche_node.trainer --fd N``: where training and data meet.

Started by the supervisor with one end of a socket pair; it ends when the other end is closed.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="psyche_node.trainer", description="The training process of a node.")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the supervisor's socket pair")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as the supervisor's Load says")
    parser.add_argument("--log-level", default="INFO")
    options = parser.parse_args(arguments)
    # Ctrl-C reaches the whole process group; the supervisor decides what happens, and closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    from psyche_node.training.server import run_trainer

    gc.freeze()
    gc.enable()
    log.configure("training", options.log_level)

    def open_data(folder: Path, expect: bytes | None, published: str) -> PackedDataset:
        return PackedDataset(folder, expect, published=published)

    run_trainer(options.fd, open_data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
