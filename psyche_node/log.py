"""One logger for every process: rich on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

from rich.console import Console
from rich.logging import RichHandler

from coordinator.printable import LINES, printable

_NOISY = ("httpx", "httpcore", "websockets", "solanaweb3", "libp2p", "asyncio", "urllib3")


class JsonLines(logging.Formatter):
    """One JSON object a line: ``ts`` (seconds), ``level``, ``name``, ``msg``, ``node`` and, if it has one, ``exc``."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": round(record.created, 3),
            "level": record.levelname,
            "node": self._node,
            "name": record.name,
            "msg": record.getMessage(),
        }
        if record.exc_info:
            line["exc"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Printable(logging.Formatter):
    """The message without control characters: peers choose part of it, and no escape sequence may reach a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LINES)


def configure(node: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send this process's log to ``stream`` (standard error by default)."""
    stream = stream or sys.stderr
    handler: logging.Handler
    if stream.isatty():
        handler = RichHandler(console=Console(file=stream), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonLines(node))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
