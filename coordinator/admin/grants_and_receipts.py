"""Grants and receipts, which have accounts of their own: those of one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from solders.pubkey import Pubkey

from coordinator.chain import Chain
from coordinator.layout import GRANT_MARK, GRANT_SIZE, RECEIPT_MARK, RECEIPT_SIZE
from coordinator.state import Grant, MalformedAccount, Receipt, decode_grant, decode_receipt

_Kind = TypeVar("_Kind", Grant, Receipt)


async def grants_of(chain: Chain, program: Pubkey, run: Pubkey, created_slot: int) -> list[tuple[Pubkey, Grant]]:
    """The grants of a run, by age; those of an earlier run of its name, created in another slot, open nothing."""
    accounts = await chain.program_accounts(program, GRANT_MARK, (0, GRANT_SIZE))
    found = _of_run([(address, account.data) for address, account in accounts], decode_grant, run, created_slot)
    return sorted(found, key=lambda one: (one[1].created_slot, str(one[0])))


async def receipts_of(chain: Chain, program: Pubkey, run: Pubkey, created_slot: int) -> list[tuple[Pubkey, Receipt]]:
    """The receipts of a run, by age; those of an earlier run of its name are worth nothing in it."""
    accounts = await chain.program_accounts(program, RECEIPT_MARK, (0, RECEIPT_SIZE))
    found = _of_run([(address, account.data) for address, account in accounts], decode_receipt, run, created_slot)
    return sorted(found, key=lambda one: (one[1].archived_slot, str(one[1].wallet)))


def _of_run(
    accounts: list[tuple[Pubkey, bytes]], decode: Callable[[bytes], _Kind], run: Pubkey, created_slot: int
) -> list[tuple[Pubkey, _Kind]]:
    found = []
    for address, data in accounts:
        try:
            record = decode(data)
        except MalformedAccount:
            continue  # another version's
        if record.run == run and record.run_slot == created_slot:
            found.append((address, record))
    return found
