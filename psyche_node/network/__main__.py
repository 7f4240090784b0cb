"""``python -m psyche_node.network --fd N``: the network process, driven by the supervisor over the socket ``N``."""

from __future__ import annotations

import os
import signal


def main() -> None:
    # Before anything is imported, which takes a second: Ctrl-C in a terminal reaches the whole process group, and when
    # to end is the supervisor's decision; and gRPC's C core would print what this process says in its own log.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from psyche_node.network.process import main as run

    run()


if __name__ == "__main__":
    main()
