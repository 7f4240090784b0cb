"""This member's share of the batch: what it can train in the time that the others take, by its own clock.

A share is tokens per second, measured while training. All members use this one unit, so shares compare; the program
cuts the batch in proportion to them.
"""

from __future__ import annotations

import logging
from typing import Final

from coordinator.client import ChainError, CoordinatorClient
from coordinator.layout import MAX_SHARE

log = logging.getLogger(__name__)

# A new measurement counts this much: one slow round is no slow host.
_WEIGHT: Final = 0.25
# Every change costs a transaction; smaller ones are not worth it.
_WORTH: Final = 0.25


class Share:
    """Keeps the share on chain at the measured speed; at `fixed`, with which the node joined, if that is not 0."""

    def __init__(self, chain: CoordinatorClient, fixed: int = 0) -> None:
        self._chain, self._fixed = chain, fixed
        self._speed: float | None = None
        self._sent: int | None = fixed or None

    async def follow(self, tokens: int, seconds: float, most: int) -> None:
        """After a round: this member trained so many tokens in so many seconds. `most`: the run's bound, or 0."""
        wanted = self._fixed or self._measure(tokens, seconds)
        wanted = max(1, min(wanted, most or MAX_SHARE, MAX_SHARE))
        if self._sent is not None and abs(wanted - self._sent) <= _WORTH * self._sent:
            return
        try:
            await self._chain.set_share(wanted)
        except ChainError as error:
            log.warning("share of the batch left as it is: %s", error)
            return
        why = "as set" if self._fixed else "tokens per second, measured"
        before = "" if self._sent is None else f", {self._sent} before"
        log.info("share of the batch: asked for %d (%s%s)", wanted, why, before)
        self._sent = wanted

    def missed(self) -> None:
        """A round was missed: the program has halved the share, which is to be sent again."""
        self._sent = None

    def _measure(self, tokens: int, seconds: float) -> int:
        speed = tokens / max(seconds, 1e-3)
        self._speed = speed if self._speed is None else self._speed + _WEIGHT * (speed - self._speed)
        return round(self._speed)
