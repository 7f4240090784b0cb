"""An event loop in a process that stands still for a while, without any waiting."""

from __future__ import annotations

import asyncio


class Leaping(asyncio.SelectorEventLoop):
    """A loop whose clock the test puts forward, as if this process had been stopped for so long."""

    slept = 0.0
    """Seconds."""

    def time(self) -> float:
        return super().time() + self.slept
