"""Why a connection could not be made, in a few words: libp2p's own are long, and name its parts."""

from __future__ import annotations

import os
from collections.abc import Iterator

import trio
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey


def why_unreached(error: BaseException) -> str:
    """What to read behind an address, for an error of ``dial``."""
    found = list(_causes(error))
    if any(isinstance(one, PeerIDMismatchesPubkey) for one in found):
        return "another node is there, with another key"
    if any(isinstance(one, ConnectionRefusedError) for one in found):
        return "nothing listens there"
    if any(isinstance(one, trio.TooSlowError) for one in found):
        return "no answer in time"
    numbers = [one.errno for one in found if isinstance(one, OSError) and one.errno]
    return os.strerror(numbers[0]).lower() if numbers else "what is there does not speak as a node does"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, those that it was raised for, and the members of groups among them."""
    todo, seen = [error], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions
