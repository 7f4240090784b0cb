"""Work that can be left between two steps and gone on with later: generators that return their result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import count
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]


def finish(steps: Steps[T], progress: Callable[[int], None] = lambda done: None) -> T:
    """Do all the steps and return the result. ``progress`` hears how many are done."""
    for done in count(1):
        try:
            next(steps)
            progress(done)
        except StopIteration as end:
            result: T = end.value
            return result
    raise AssertionError("counting has no end")
