"""Priority fees: a fixed price, or one that follows what the cluster has lately asked for, up to a cap."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Literal

from coordinator.jsonrpc import ChainError, Json, Unusable
from coordinator.rpc import Endpoints

log = logging.getLogger(__name__)

AUTO: Final = "auto"
PriorityFee = int | Literal["auto"]
# At 120,000 compute units this is 0.00012 SOL per transaction.
DEFAULT_FEE_CAP: Final = 1_000_000
_FRESH_SECONDS: Final = 20.0
_PATIENCE: Final = 3.0
_PERCENTILE: Final = 0.75
_MAX_SLOTS: Final = 1000


class PriorityFees:
    """The price of a transaction in micro-lamports per compute unit.

    `auto` is the 75th percentile, over the slots that the endpoint remembers (150 on a cluster), of the least price
    that got a transaction into the slot which writes the same accounts. It doubles each time a transaction expires.

    Args:
        rpc: where to ask.
        setting: micro-lamports per compute unit, or "auto".
        cap: what "auto" never goes above.
    """

    def __init__(self, rpc: Endpoints, setting: PriorityFee, cap: int) -> None:
        if isinstance(setting, str) and setting != AUTO:
            raise ValueError(f"priority fee {setting!r} must be a number of micro-lamports per compute unit, or auto")
        if (isinstance(setting, int) and setting < 0) or cap < 0:
            raise ValueError(f"priority fee {setting} and its cap {cap} must not be negative")
        self._rpc = rpc
        self._setting = setting
        self._cap = cap
        self._estimates: dict[tuple[str, ...], tuple[float, int]] = {}

    async def price(self, written: Sequence[str], expired: int) -> int:
        """The price for a transaction that writes these accounts and has expired so often before. Never raises."""
        if isinstance(self._setting, int):
            return self._setting
        estimate = await self._estimate(tuple(sorted(written))[:128])
        if expired:
            estimate = max(estimate, 1000) << min(expired, 20)
        return min(estimate, self._cap)

    async def _estimate(self, accounts: tuple[str, ...]) -> int:
        now = asyncio.get_running_loop().time()
        asked_at, estimate = self._estimates.get(accounts, (float("-inf"), 0))
        if now - asked_at < _FRESH_SECONDS:
            return estimate
        try:
            estimate = await self._rpc.ask(
                "getRecentPrioritizationFees", [list(accounts)], _percentile, patience=_PATIENCE
            )
        except ChainError as error:
            log.warning("no estimate of the priority fee, using %d micro-lamports: %s", estimate, error)
        if len(self._estimates) > 64:
            self._estimates.clear()
        self._estimates[accounts] = (now, estimate)
        return estimate


def _percentile(answer: Json) -> int:
    if not isinstance(answer, list):
        raise Unusable("getRecentPrioritizationFees: the answer is not a list")
    fees: list[int] = []
    for one in answer[:_MAX_SLOTS]:
        fee = one.get("prioritizationFee") if isinstance(one, dict) else None
        if isinstance(fee, bool) or not isinstance(fee, int) or not 0 <= fee < 2**64:
            raise Unusable("getRecentPrioritizationFees: an entry has no fee")
        fees.append(fee)
    fees.sort()
    return fees[min(int(len(fees) * _PERCENTILE), len(fees) - 1)] if fees else 0
