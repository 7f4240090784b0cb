"""An operator reads how a process ended, and what that means, not a negative number."""

from __future__ import annotations

import signal

import pytest

from psyche_node.endings import how_it_ended


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (None, "it closed its end of the conversation"),
        (0, "exit status 0"),
        (7, "exit status 7"),
        (3, "exit status 3 (a part of it had died)"),
        (-signal.SIGKILL, "killed by SIGKILL (usually the kernel, for want of memory: look at `dmesg` or "),
        (-signal.SIGTERM, "killed by SIGTERM (it was asked to end)"),
        (-signal.SIGUSR1, "killed by SIGUSR1"),
        (-signal.SIGRTMAX + 1, f"killed by signal {signal.SIGRTMAX - 1}"),
    ],
    ids=lambda value: str(value)[:20].replace(" ", "-"),
)
def test_words(status: int | None, said: str) -> None:
    assert how_it_ended(status, {3: "a part of it had died."}).startswith(said)
