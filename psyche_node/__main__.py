"""`psyche-node`, which can be stopped from its first instant on: importing its commands takes a while."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

_STOPPED = 130  # Exit.INTERRUPTED, which is not imported yet


def main() -> None:
    """Run the command line. SIGTERM ends every command with the status of one that was stopped, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        from psyche_node.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(_STOPPED) from None
    run()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(_STOPPED)


if __name__ == "__main__":
    main()
