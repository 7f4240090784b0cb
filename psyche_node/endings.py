"""How a process ended, in words: its own exit status, or the signal that killed it and what that usually means."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final

_CRASH: Final = "a crash in compiled code (PyTorch, CUDA, libp2p)"
_MEANINGS: Final = {
    "SIGKILL": "usually the kernel, for want of memory: look at `dmesg` or `journalctl -k`; else somebody's kill -9",
    "SIGTERM": "it was asked to end",
    "SIGINT": "it was asked to end, by Ctrl-C",
    "SIGHUP": "the terminal that it belonged to was closed",
    "SIGSEGV": _CRASH,
    "SIGBUS": f"{_CRASH}, or no room left in /dev/shm",
    "SIGILL": "an instruction that this CPU does not have",
    "SIGFPE": _CRASH,
    "SIGABRT": f"{_CRASH} that it noticed itself",
    "SIGXCPU": "its limit of CPU time (ulimit -t)",
    "SIGXFSZ": "its limit of the size of a file (ulimit -f)",
}


def how_it_ended(status: int | None, meanings: Mapping[int, str] | None = None) -> str:
    """What to read behind "the process ended: ".

    ``status`` is Python's: negative for a signal, None for a process that still runs. ``meanings`` are those of its
    own exit statuses.
    """
    if status is None:
        return "it closed its end of the conversation"
    if status >= 0:
        meaning = (meanings or {}).get(status)
        return f"exit status {status}" + (f" ({meaning.rstrip('.')})" if meaning else "")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    meaning = _MEANINGS.get(name)
    return f"killed by {name}" + (f" ({meaning})" if meaning else "")
