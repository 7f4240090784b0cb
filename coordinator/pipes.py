"""A command whose output nobody reads any more, as in `psyche-admin run show RUN | head`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Final

READER_GONE: Final = 128 + signal.SIGPIPE
"""What a shell says of a program that the kernel ended for it."""


def end_with_reader(app: Callable[[], object]) -> None:
    """Run a command line. Where the reader of its output has gone, it ends without a word, as `cat` does, with 141."""
    if sys.stdout is None:  # whoever started it has closed it
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where it can still be answered: at the interpreter's end it cannot
    except BrokenPipeError:
        _end()
    except SystemExit as error:
        # typer and rich make an exit status of 1 of it.
        if isinstance(error.__context__, BrokenPipeError):
            _end()
        raise


def _end() -> None:
    """Raises SystemExit. What is left in the buffer has nowhere to go, and must not fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    raise SystemExit(READER_GONE) from None
