"""``python -m psyche_node.network --fd N``: the network process, driven by the supervisor over the socket ``N``."""

from __future__ import annotations

import os
import signal


def main() -> None:
    # Before anything is imported, which takes a second: Ctrl-C in a terminal reaches the whole process group, SIGTERM
    # all processes of a service, and when to end is the supervisor's decision; and what gRPC's C core says about TLS
    # handshakes is wanted (corelog).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["GRPC_VERBOSITY"] = "INFO"
    from psyche_node.network.process import main as run

    run()


if __name__ == "__main__":
    main()
