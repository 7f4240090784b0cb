"""`psyche-node`, which can be stopped from its first instant on: importing its commands takes a while."""

from __future__ import annotations

from psyche_node.commands.interrupts import Interrupts


def main() -> None:
    try:
        with Interrupts().heard():
            from psyche_node.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
