"""SIGTERM and Ctrl-C, at whatever moment of a command's life they come."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Both signals mean the same. Within ``heard`` the first raises KeyboardInterrupt where the command is; within
    ``call``, each is a call instead. After the first, none ends the process: it is on its way already."""

    def __init__(self) -> None:
        self.asked = False
        self._then: Callable[[], object] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Raises KeyboardInterrupt."""
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            if not self.asked:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def call(self, then: Callable[[], object]) -> Iterator[None]:
        self._then = then
        try:
            yield
        finally:
            self._then = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if self._then is not None:
            self._then()
        elif first:
            raise KeyboardInterrupt
