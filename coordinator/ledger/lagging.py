"""A second bank that follows the first a number of slots behind: what an endpoint that lags answers from."""

from __future__ import annotations

from collections import deque

from coordinator.ledger.bank import AdvanceSlot, Bank, Change


class Lagging:
    """Follows `live` at a distance of `slots` slots.

    Args:
        live: the bank to follow.
        twin: a bank in the same state as `live` is in now; it is this object's from here on.
        slots: the distance.
    """

    def __init__(self, live: Bank, twin: Bank, slots: int) -> None:
        if twin.slot != live.slot or twin.transaction_count != live.transaction_count:
            raise ValueError("the lagging bank does not start in the state of the one that it follows")
        self.bank = twin
        self._slots = slots
        self._waiting: deque[Change] = deque()
        live.on_change.append(self._follow)

    def _follow(self, change: Change) -> None:
        self._waiting.append(change)
        if not isinstance(change, AdvanceSlot):
            return
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, AdvanceSlot) and first.slot + self._slots > change.slot:
                return
            self.bank.apply(self._waiting.popleft())
