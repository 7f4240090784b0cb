"""Looking for what may be so new that an endpoint does not have it yet: a few times, everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from coordinator.chain import Chain

T = TypeVar("T")

_LOOKS: Final = 3
_PAUSE: Final = 0.8


async def look(rpc_urls: Sequence[str], options: Mapping[str, Any], ask: Callable[[Chain], Awaitable[T]]) -> T:
    """What `ask` gets, once that is anything; else the last that it gets, after all looks.

    Each look is a connection of its own, and prefers another endpoint: one that is behind answers as readily as the
    others, that there is nothing.

    Args:
        rpc_urls: RPC endpoints in order of preference.
        options: those of Chain.
        ask: looks at a chain once; what is false of its results is nothing.

    Raises what `ask` does, and ChainUnavailable.
    """
    for number in range(_LOOKS):
        if number:
            await asyncio.sleep(_PAUSE)
        first = number % max(len(rpc_urls), 1)
        async with Chain([*rpc_urls[first:], *rpc_urls[:first]], **options) as chain:
            if found := await ask(chain):
                break
    return found
