"""The bridge from trio to blocking code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def in_thread(function: Callable[[], T], limiter: trio.CapacityLimiter | None = None) -> T:
    """Run ``function`` in a thread. When cancelled, leave it to its own deadline and go on."""
    # The ignore: libp2p brings trio-typing, whose stubs are older than trio and hide its own types.
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True, limiter=limiter)  # type: ignore[call-arg]
