"""How a command ends that cannot do what it was asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from coordinator.printable import LINES, printable
from psyche_node.exits import Exit, exit_for


@contextmanager
def failures(*known: type[Exception]) -> Iterator[None]:
    """End the command with the message and exit code of an error of these classes, or of Ctrl-C."""
    expected: tuple[type[Exception], ...] = (OSError, *known)
    try:
        yield
    except expected as error:
        typer.secho(printable(_words(error), LINES), fg="red", err=True)
        raise typer.Exit(exit_for(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


def _words(error: Exception) -> str:
    """The message; of the system's own errors without their number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
