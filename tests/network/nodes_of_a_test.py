"""As many nodes as a test asks for, each in a folder of its own, closed at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar


class Closing(Protocol):
    def close(self) -> None: ...


N = TypeVar("N", bound=Closing)


def makers_of(kind: Callable[[Path], N], folder: Path) -> Iterator[Callable[[], N]]:
    """Yield what makes another node; for a fixture to ``yield from``."""
    nodes: list[N] = []

    def one() -> N:
        nodes.append(kind(folder / str(len(nodes))))
        return nodes[-1]

    yield one
    for node in nodes:
        node.close()
