"""The ledger's clock: slots follow real time, and go wrong where they are told to."""

from __future__ import annotations

import asyncio
import time

from coordinator.ledger.bank import AdvanceSlot, Bank
from coordinator.ledger.faults import Faults


async def keep_time(bank: Bank, slot_seconds: float, faults: Faults) -> None:
    """Advance the bank's slots for ever.

    Slots that a busy machine missed are skipped, as a cluster skips them. A halted chain resumes with the slot after
    the one that it stood still at.
    """
    loop = asyncio.get_running_loop()
    stopped_at = bank.unix_time if faults.clock_stopped else None
    start, first = loop.time(), bank.slot
    halt = faults.halt_slot if faults.halt_slot is not None and faults.halt_slot > first else None
    while True:
        elapsed = int((loop.time() - start) / slot_seconds)
        slot = first + elapsed
        if halt is not None:
            slot = min(slot, halt)
        if slot > bank.slot:
            bank.apply(AdvanceSlot(slot, unix_now(faults) if stopped_at is None else stopped_at))
        if slot == halt:
            if faults.halt_seconds is None:
                await asyncio.Event().wait()
            else:
                await asyncio.sleep(faults.halt_seconds)
            start, first, elapsed, halt = loop.time(), bank.slot, 0, None
        await asyncio.sleep(start + (elapsed + 1) * slot_seconds - loop.time())


def unix_now(faults: Faults) -> int:
    """The chain's Unix time in seconds."""
    return int(time.time()) + faults.clock_skew_s
