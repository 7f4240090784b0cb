"""A run's past, read out of the chain's transaction history: every event that the program logged about it."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any, Final

from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction

from coordinator.chain import Chain, ChainError, ChainUnavailable
from coordinator.events import Event, events_in
from coordinator.jsonrpc import Json

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


async def happenings(
    chain: Chain, program: Pubkey, run: Pubkey, signatures: list[str]
) -> tuple[list[Happening], HistoryIncomplete | None]:
    """The run's events in these transactions, in their order, as far back as the endpoint has them: if a transaction or
    a part of its log is no longer there, only the events behind the last such one, and what is wrong with it.

    A transaction that does not call the program has no events, whatever has become of its log: anyone can name the
    run's address in one and log more than the chain keeps.
    """
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def read(signature: str) -> list[Happening] | HistoryIncomplete:
        async with room:
            return await _read(chain, program, run, signature)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(signature)) for signature in signatures]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    found: list[Happening] = []
    gap: HistoryIncomplete | None = None
    for task in tasks:
        events = task.result()
        if isinstance(events, HistoryIncomplete):
            found, gap = [], events
        else:
            found += events
    return found, gap


async def _read(chain: Chain, program: Pubkey, run: Pubkey, signature: str) -> list[Happening] | HistoryIncomplete:
    options = {"encoding": "base64", "commitment": "confirmed", "maxSupportedTransactionVersion": 0}
    found: Any = await chain.rpc.call("getTransaction", [signature, options])
    if found is None:
        return HistoryIncomplete(f"the endpoint no longer has transaction {signature} of run {run}")
    try:
        slot, meta = int(found["slot"]), found["meta"]
        logs = meta["logMessages"]
        whole = isinstance(logs, list) and _TRUNCATED not in logs
        if not whole and _may_call(program, found["transaction"][0], meta):
            return HistoryIncomplete(f"the log of transaction {signature} of run {run} is cut off or missing")
    except (AttributeError, TypeError, KeyError, ValueError, IndexError) as error:
        raise ChainUnavailable("getTransaction: the endpoint's answer does not have Solana's shape") from error
    if not whole:
        return []
    events = (event for event in events_in(map(str, logs), program) if event.run == run)
    return [Happening(slot, signature, index, event) for index, event in enumerate(events)]


def _may_call(program: Pubkey, transaction: str, meta: Any) -> bool:
    """Whether a transaction can have called a program: it names it and, where the endpoint lists calls, there is one.

    Raises AttributeError, TypeError, KeyError, ValueError, IndexError for what does not have Solana's shape.
    """
    message = VersionedTransaction.from_bytes(base64.b64decode(transaction)).message
    loaded = meta.get("loadedAddresses") or {}
    keys = [*map(str, message.account_keys), *loaded.get("writable", []), *loaded.get("readonly", [])]
    if str(program) not in keys:
        return False
    inner = meta.get("innerInstructions")
    if inner is None:
        return True
    calls = [one.program_id_index for one in message.instructions]
    calls += [one["programIdIndex"] for group in inner for one in group["instructions"]]
    return any(keys[index] == str(program) for index in calls)
