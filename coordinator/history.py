"""A run's past, read out of the chain's transaction history: every event that the program logged about it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from solders.pubkey import Pubkey

from coordinator.chain import Chain, ChainError, ChainUnavailable
from coordinator.events import Event, events_in
from coordinator.rpc import Json

_PAGE: Final = 1000
_MAX_PAGES: Final = 10_000
_IN_FLIGHT: Final = 8
_TRUNCATED: Final = "Log truncated"


class HistoryIncomplete(ChainError):
    """The endpoint does not have all transactions of a run any more."""


@dataclass(frozen=True, slots=True)
class Happening:
    """An event where it stands on the chain: slot, transaction, and its place among the run's events in that one."""

    slot: int
    signature: str
    index: int
    event: Event


async def signatures_of(chain: Chain, address: Pubkey, until: str | None = None) -> list[tuple[str, bool]]:
    """The transactions that name an account, oldest first, and whether each succeeded; only those after `until`."""
    found: list[tuple[str, bool]] = []
    before: str | None = None
    for _ in range(_MAX_PAGES):
        options: dict[str, Json] = {"limit": _PAGE, "commitment": "confirmed"}
        if before is not None:
            options["before"] = before
        if until is not None:
            options["until"] = until
        page = await chain.rpc.call("getSignaturesForAddress", [str(address), options])
        try:
            found += [(str(one["signature"]), one["err"] is None) for one in page]
        except (TypeError, KeyError) as error:
            raise ChainUnavailable(
                "getSignaturesForAddress: the endpoint's answer does not have Solana's shape"
            ) from error
        if len(page) < _PAGE:
            break
        before = found[-1][0]
    found.reverse()
    return found


async def happenings(chain: Chain, program: Pubkey, run: Pubkey, signatures: list[str]) -> list[Happening]:
    """The run's events in these transactions, in their order.

    Raises:
        HistoryIncomplete: a transaction, or a part of its log, is no longer there.
    """
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def read(signature: str) -> list[Happening]:
        async with room:
            return await _read(chain, program, run, signature)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(signature)) for signature in signatures]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [one for task in tasks for one in task.result()]


async def _read(chain: Chain, program: Pubkey, run: Pubkey, signature: str) -> list[Happening]:
    options = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    found: Any = await chain.rpc.call("getTransaction", [signature, options])
    if found is None:
        raise HistoryIncomplete(f"the endpoint no longer has transaction {signature} of run {run}")
    try:
        slot, logs = int(found["slot"]), found["meta"]["logMessages"]
    except (TypeError, KeyError, ValueError) as error:
        raise ChainUnavailable("getTransaction: the endpoint's answer does not have Solana's shape") from error
    if not isinstance(logs, list) or _TRUNCATED in logs:
        raise HistoryIncomplete(f"the log of transaction {signature} of run {run} is cut off or missing")
    events = (event for event in events_in(map(str, logs), program) if event.run == run)
    return [Happening(slot, signature, index, event) for index, event in enumerate(events)]
