"""Settings of every test."""

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# How long an example takes says something about the machine only.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Where they are set, rich and typer colour and fold what tests read. Typer looks once, when it is imported.
TERMINAL = (
    *("CLICOLOR_FORCE", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("COLUMNS", "LINES", "TERMINAL_WIDTH"),
)


def pytest_sessionstart() -> None:
    """Before tests are imported, and after pytest has seen how its own output is to look."""
    for name in TERMINAL:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A command run in this process logs to a stream that is closed after its test: no later test may write there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
