"""Work that can be left between two steps and gone on with later: generators that return their result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]


def finish(steps: Steps[T], progress: Callable[[int], None] = lambda done: None) -> T:
    """Do all the steps and return the result. ``progress`` hears how many are done."""
    done = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        done += 1
        progress(done)
