"""How a command ends that cannot do what it was asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from coordinator.printable import LINES, printable
from psyche_node.exits import Exit, exit_for, in_words


@contextmanager
def failures(*known: type[Exception]) -> Iterator[None]:
    """End the command with the message and exit code of an error of these classes, or of Ctrl-C."""
    expected: tuple[type[Exception], ...] = (OSError, *known)
    try:
        yield
    except BrokenPipeError:
        raise  # who reads has gone: nobody is there to be told
    except expected as error:
        typer.secho(printable(in_words(error), LINES), fg="red", err=True)
        raise typer.Exit(exit_for(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None
